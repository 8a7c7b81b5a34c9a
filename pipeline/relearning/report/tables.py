"""The relearning report's tables: which figures they compare, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.relearning.evaluation import CLEAN, CLEAN_PART, WHOLE
from pipeline.relearning.report.results import (
    MeanAccuracy,
    Relearned,
    Row,
    mean_accuracies,
    relearned,
    relearned_by_regime,
    select,
)
from pipeline.relearning.shares import parse_share

READINGS = ("accuracy_last", "accuracy_early_stop", "accuracy_best", "accuracy_train")
DELTA_TESTS = ("accuracy_own_delta", "accuracy_wrong_delta")
OVERLAPS = ("purity", "adjusted_mutual_information", "shortcut_accuracy")
DENOISER_GAINS = ("denoiser_own_db", "denoiser_here_db")
QUALITIES = ("sse", "silhouette", "calinski_harabasz")


@dataclass(frozen=True)
class Order:
    """Names in display order, and the labelling and share of the headline.

    protections   excluding the controls
    """

    protections: tuple[str, ...]
    targets: tuple[str, ...]
    regimes: tuple[str, ...]
    labellings: tuple[str, ...]
    shares: tuple[str, ...]
    labelling: str
    share: str


@dataclass(frozen=True)
class Headline:
    """Relearned accuracy of one protection (or CLEAN) under one labelling and share, and the control's same maximum."""

    protection: str
    labelling: str
    share: str
    found: Relearned | None
    clean: Relearned | None
    num_trials: int
    num_diverged: int


def order_of(rows: Sequence[Row], protections: Iterable[str], settings: Mapping[str, Any]) -> Order:
    """The order given by the settings, followed by anything else in the rows, sorted by name."""

    def names(column: str, given: Iterable[Any]) -> tuple[str, ...]:
        present = {str(row[column]) for row in rows}
        first = [str(name) for name in given if str(name) in present]
        return tuple(dict.fromkeys(first + sorted(present)))

    labellings = names("labelling", settings.get("labellings") or ("original",))
    shares = tuple(sorted({str(row["share"]) for row in rows if is_protection(row)}, key=parse_share))
    return Order(
        protections=tuple(name for name in names("protection", protections) if name not in (CLEAN, CLEAN_PART)),
        targets=names("target", settings.get("targets") or ()),
        regimes=names("regime", settings.get("regimes") or ("nt", "nt-cg", "st", "st-cg", "st-full")),
        labellings=labellings,
        shares=shares,
        labelling=labellings[0] if labellings else "original",
        share=WHOLE if WHOLE in shares or not shares else max(shares, key=lambda share: parse_share(share)[1]),
    )


def is_protection(row: Row) -> bool:
    """True for trainings on protected images, False for both controls."""
    return row["protection"] not in (CLEAN, CLEAN_PART)


def headlines(rows: Sequence[Row], order: Order) -> list[Headline]:
    """One headline per labelling, share and protection with trials, and one for CLEAN per labelling."""
    lines = []
    for labelling in order.labellings:
        clean = relearned(rows, CLEAN, labelling=labelling)
        arms = [
            (name, share)
            for share in sorted(order.shares, key=lambda s: s != order.share)
            for name in order.protections
        ]
        for name, share in [*arms, (CLEAN, WHOLE)]:
            chosen = select(rows, name, labelling, share)
            if chosen:
                reached = relearned(rows, name, labelling=labelling, share=share)
                num_diverged = sum(bool(row["diverged"]) for row in chosen)
                lines.append(Headline(name, labelling, share, reached, clean, len(chosen), num_diverged))
    return lines


def accuracy_table(rows: Sequence[Row], order: Order, protection: str, labelling: str) -> list[tuple[str, list[Any]]]:
    """(regime, [(clean, protected), …] by target) for the headline share; MeanAccuracy, or None if not tried.

    For CLEAN, both entries are the clean one.
    """
    means = {
        arm: mean_accuracies(select(rows, arm, labelling, order.share), ("regime", "target"))
        for arm in (CLEAN, protection)
    }
    present = [
        regime for regime in order.regimes if any(cell[0] == regime for by_cell in means.values() for cell in by_cell)
    ]
    return [
        (regime, [(means[CLEAN].get((regime, t)), means[protection].get((regime, t))) for t in order.targets])
        for regime in present
    ]


def heat_map(rows: Sequence[Row], order: Order) -> tuple[list[str], list[tuple[str, list[tuple[float | None, bool]]]]]:
    """Column names, and (regime, [(accuracy of the best target, whether it is the column's largest), …]).

    None: not run, or every trial diverged.
    """
    columns = [CLEAN, *order.protections]
    reached = {name: relearned_by_regime(rows, name, labelling=order.labelling, share=order.share) for name in columns}

    def shown(regime: str, name: str) -> tuple[float | None, bool]:
        value = reached[name].get(regime)
        return value, value is not None and value == max(reached[name].values())

    return columns, [(regime, [shown(regime, name) for name in columns]) for regime in order.regimes]


def floors(rows: Sequence[Row], order: Order) -> dict[str, tuple[float, float | None, int]]:
    """labelling -> (accuracy of guessing, share of the most common class among test images, number of classes)."""
    by_labelling = {}
    for labelling in order.labellings:
        row = next(row for row in rows if row["labelling"] == labelling)
        by_labelling[labelling] = (1 / row["num_classes"], row.get("majority"), int(row["num_classes"]))
    return by_labelling


def readings(rows: Sequence[Row], order: Order) -> list[tuple[str, str, str, list[float | None]]]:
    """(protection, regime, target, means of READINGS and DELTA_TESTS), excluding diverged trials."""
    table = []
    for name in (*order.protections, CLEAN):
        chosen = select(rows, name, order.labelling, order.share)
        for regime in order.regimes:
            for target in order.targets:
                cell = [
                    row for row in chosen if (row["regime"], row["target"]) == (regime, target) and not row["diverged"]
                ]
                if cell:
                    table.append((name, regime, target, [_mean(cell, column) for column in (*READINGS, *DELTA_TESTS)]))
    return table


@dataclass(frozen=True)
class ShareCurve:
    """Accuracy as a function of the protected share, for one regime and target.

    points   share -> MeanAccuracy; 0 is the clean control. For CLEAN_PART, the share is what is left out.
    """

    protection: str
    regime: str
    target: str
    points: Mapping[float, MeanAccuracy]


def share_curves(rows: Sequence[Row], order: Order, kind: str) -> list[ShareCurve]:
    """Curves over shares of `kind`, samples or classes; empty if no share of that kind below 1 was tried."""
    parts = {share: parse_share(share)[1] for share in order.shares}
    if not any(parse_share(share)[0] == kind and part < 1 for share, part in parts.items()):
        return []
    # A share of 1 is the same whether samples or classes are counted
    used = [
        share
        for share in sorted(parts, key=lambda s: parse_share(s)[0] == kind)
        if share.startswith(f"{kind}:") or parts[share] == 1
    ]
    curves = []
    for regime in order.regimes:
        for target in order.targets:
            for name in (*order.protections, CLEAN_PART):
                points: dict[float, MeanAccuracy] = {}
                for part, arm, share in [(0.0, CLEAN, WHOLE)] + [(parts[share], name, share) for share in used]:
                    chosen = select(rows, arm, order.labelling, share)
                    cell = mean_accuracies(chosen, ("regime", "target")).get((regime, target))
                    if cell is not None:
                        points[part] = cell
                if any(0 < part < 1 for part in points):
                    curves.append(ShareCurve(name, regime, target, dict(sorted(points.items()))))
    return curves


def overlaps(rows: Sequence[Row], order: Order) -> list[tuple[str, str, int, list[tuple[float, ...]]]]:
    """(labelling, protection, number of classes, OVERLAPS of each fit) for protections whose clusters are known."""
    table = []
    for labelling in order.labellings:
        for name in order.protections:
            known = [
                row
                for row in rows
                if (row["labelling"], row["protection"]) == (labelling, name)
                and any(row.get(column) is not None for column in OVERLAPS)
            ]
            if known:
                by_fit = [row for _, row in sorted({int(row["fit"]): row for row in known}.items())]
                values = [
                    tuple(float(row[column]) for row in by_fit if row.get(column) is not None) for column in OVERLAPS
                ]
                table.append((labelling, name, int(known[0]["num_classes"]), values))
    return table


def qualities(rows: Sequence[Row], order: Order) -> list[tuple[str, int, list[float | None]]]:
    """(labelling, number of classes, QUALITIES) for labellings that group classes by their names."""
    table = []
    for labelling in order.labellings:
        row = next((row for row in rows if row["labelling"] == labelling and row.get("sse") is not None), None)
        if row is not None:
            table.append((labelling, int(row["num_classes"]), [row.get(column) for column in QUALITIES]))
    return table


def denoisers(rows: Sequence[Row], order: Order) -> list[tuple[str, str, list[float | None]]]:
    """(regime, protection, means of DENOISER_GAINS in dB) for regimes that clean images with a denoiser."""
    table = []
    for regime in order.regimes:
        for name in (*order.protections, CLEAN):
            cell = [row for row in select(rows, name, order.labelling, order.share) if row["regime"] == regime]
            gains = [_mean(cell, column) for column in DENOISER_GAINS]
            if gains[0] is not None:
                table.append((regime, name, gains))
    return table


@dataclass(frozen=True)
class Cost:
    """Cost of one regime and target.

    seconds  mean of a trial, tests included
    factor   `seconds` relative to nt's; None if nt was not run
    """

    regime: str
    target: str
    device: str
    num_trials: int
    seconds: float
    images_per_second: float | None
    factor: float | None

    @property
    def total(self) -> float:
        """Seconds of all trials together."""
        return self.num_trials * self.seconds


def costs(rows: Sequence[Row], order: Order) -> list[Cost]:
    """Costs by target, device and regime, over all trials that did not diverge."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not row["diverged"] and row.get("seconds") is not None:
            cells.setdefault((str(row["target"]), str(row.get("device") or ""), str(row["regime"])), []).append(row)
    seconds = {cell: _mean(trials, "seconds") or 0.0 for cell, trials in cells.items()}
    table = []
    for cell in sorted(cells, key=lambda cell: (order.targets.index(cell[0]), cell[1], order.regimes.index(cell[2]))):
        target, device, regime = cell
        plain = seconds.get((target, device, "nt"))
        table.append(
            Cost(
                regime=regime,
                target=target,
                device=device,
                num_trials=len(cells[cell]),
                seconds=seconds[cell],
                images_per_second=_mean(cells[cell], "images_per_second"),
                factor=seconds[cell] / plain if plain else None,
            )
        )
    return table


def warnings(rows: Sequence[Row], order: Order) -> list[str]:
    """Reasons why the figures may not be comparable, as sentences; empty if there are none."""
    sentences = []
    if not any(row["protection"] == CLEAN for row in rows):
        sentences.append("The clean control was not run, so there is no baseline for what could be learned.")
    seeds = len({row["seed"] for row in rows})
    if 0 < seeds < 3:
        number = "One seed" if seeds == 1 else "Two seeds"
        sentences.append(
            f"{number} per cell: differences of a few points may be noise. Run three or more to measure it."
        )
    for name in order.protections:
        fits = len({row["fit"] for row in select(rows, name, order.labelling, order.share)})
        if 0 < fits < 3:
            number = "One fit" if fits == 1 else "Two fits"
            sentences.append(
                f"{number} of {name}: another seed may differ by several points. Run three or more fits to measure it."
            )
    diverged = sum(bool(row["diverged"]) for row in rows)
    if diverged:
        sentences.append(f"{diverged} of {len(rows)} trials diverged; they are marked and excluded from averages.")
    for column in ("epochs", "recipe", "side"):
        values = sorted({str(row[column]) for row in rows if row.get(column) is not None})
        if len(values) > 1:
            sentences.append(
                f"The trials differ in {column} ({', '.join(values)}), so their figures are not comparable."
            )
    return sentences + [*_missing_cells(rows, order)]


def _missing_cells(rows: Sequence[Row], order: Order) -> Iterable[str]:
    """A warning for each protection that was not tried under the same regimes and targets as the clean control."""
    clean = {(row["regime"], row["target"]) for row in select(rows, CLEAN, order.labelling, order.share)}
    for name in order.protections if clean else ():
        cells = {(row["regime"], row["target"]) for row in select(rows, name, order.labelling, order.share)}
        if cells != clean:
            yield (
                f"{name} and the clean control were not tried under the same regimes and targets "
                f"({len(cells)} and {len(clean)} combinations), so their maxima are not directly comparable."
            )


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else None
