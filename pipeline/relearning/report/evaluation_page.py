"""Rows of finished trials -> one self-contained HTML page without scripts or dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.relearning.evaluation import CLEAN, CLEAN_PART
from pipeline.relearning.report import charts as pictures
from pipeline.relearning.report import tables
from pipeline.relearning.report.chosen import choices
from pipeline.relearning.report.descriptions import describe_regime
from pipeline.relearning.report.results import MeanAccuracy, Row, select
from pipeline.relearning.shares import parse_share
from pipeline.report.charts import CLEAN as CLEAN_COLOUR
from pipeline.report.charts import INK
from pipeline.report.page import find_template, fits_range, percent, plain_url

SHOWN_ACTIVATIONS = 12  # trainings; each picture takes about 50 kB
_OPEN_PANELS = 24  # with more learning curves than this, targets are collapsed
_HIDDEN_SETTINGS = {
    "clean",
    "test",
    "protected",
    "output",
    "pairs",
    "debug",
    "dry_run",
}  # URLs are shown elsewhere, without credentials


@dataclass(frozen=True)
class EvaluationAbout:
    """What was compared; user names, passwords and queries in URLs are not shown.

    protected   name -> URLs of its fits, in display order
    settings    of the evaluation, by name; sets the order of targets, regimes and labellings
    left_out    name of a collection -> number of its samples that could not be read
    pairs       URLs of the pictures denoisers were trained on and of their protected copies; or empty
    """

    clean: str
    test: str
    protected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    pairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """A chart and its caption."""

    name: str
    words: str
    chart: Markup


def write_relearning_report(rows: Sequence[Row], *, about: EvaluationAbout) -> str:
    """The page as self-contained HTML; names are escaped.

    rows   results of pipeline.relearning.trial.run_trial, in any order, with key, side, versions and, if a protection's
           clusters are known, purity, adjusted_mutual_information and shortcut_accuracy
    The same rows and `about` give the same page.
    """
    rows = sorted(rows, key=lambda row: (row["seed"], row.get("fit") or 0, str(row.get("key"))))
    order = tables.order_of(rows, about.protected, about.settings)
    shown = [name for name in (CLEAN, *order.protections) if _chosen(rows, order, name)]
    template = find_template("relearning.html.j2", mean_sd=mean_sd, fits_range=fits_range, describe=describe_regime)
    all_headlines = tables.headlines(rows, order)
    return template.render(
        rows=rows,
        order=order,
        clean_url=plain_url(about.clean),
        test_url=plain_url(about.test),
        protected_urls=[(name, plain_url(url)) for name, urls in about.protected.items() for url in urls],
        pairs_urls=[plain_url(url) for url in about.pairs],
        headlines=all_headlines,
        first_line=first_line(all_headlines, order),
        warnings=tables.warnings(rows, order),
        floors=tables.floors(rows, order),
        accuracy_tables=_accuracy_tables(rows, order),
        heat_map=tables.heat_map(rows, order),
        legend=[(name, _variable(order, name)) for name in shown],
        learning=_learning_panels(rows, order),
        staged=_staged_panels(rows, order),
        activations=_activations(rows, order),
        num_activations=sum(bool(row.get("pictures")) for row in rows),
        share_kinds=_share_kinds(rows, order),
        overlaps=tables.overlaps(rows, order),
        qualities=tables.qualities(rows, order),
        readings=tables.readings(rows, order),
        has_delta_tests=any(row.get(name) is not None for row in rows for name in tables.DELTA_TESTS),
        choices=choices(rows, order),
        denoisers=tables.denoisers(rows, order),
        costs=tables.costs(rows, order),
        data=_data(rows, order),
        left_out=about.left_out,
        settings=[(name, _words(value)) for name, value in about.settings.items() if name not in _HIDDEN_SETTINGS],
        versions=sorted({str(row["versions"]) for row in rows if row.get("versions")}),
    )


def first_line(headlines: Sequence[tables.Headline], order: tables.Order) -> str:
    """Relearned accuracy per protection, the same maximum for the clean control, and how many regimes were tried."""
    main = [headline for headline in headlines if headline.labelling == order.labelling]
    protected = [headline for headline in main if headline.protection != CLEAN and headline.share == order.share]
    measured = [
        headline
        for headline in main
        if headline.found is not None and (headline in protected or headline.protection == CLEAN)
    ]
    if not any(headline in protected for headline in measured):
        return "How much a target still learns from the protected images has not been measured."
    numbers = {headline.found.num_regimes for headline in measured if headline.found is not None}
    of = f" of {_regimes(numbers.pop())}" if len(numbers) == 1 else ""
    on = f" on {len(order.targets)} targets" if len(order.targets) > 1 else ""
    figures = []
    for headline in protected:
        count = f" (of {_regimes(headline.found.num_regimes)})" if headline.found is not None and not of else ""
        spread = fits_range(headline.found.fits) if headline.found is not None else ""
        accuracy = percent(None if headline.found is None else headline.found.accuracy)
        figures.append(f"{headline.protection} {accuracy}{spread}{count}")
    clean = next((headline for headline in measured if headline.protection == CLEAN), None)
    control = "the clean control was not measured"
    if clean is not None and clean.found is not None:
        count = f" (of {_regimes(clean.found.num_regimes)})" if not of else ""
        control = f"clean images {percent(clean.found.accuracy)}{count}"
    return f"Relearned accuracy, worst case{of}{on}: {', '.join(figures)}; {control}."


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _regimes(number: int) -> str:
    return f"{number} regime" if number == 1 else f"{number} regimes"


def mean_sd(cell: MeanAccuracy | None) -> str:
    """'65.5 ± 1.2 %', with the range over fits if there are several, and the number of diverged trials."""
    if cell is None:
        return "–"
    total = cell.num_trials + cell.num_diverged
    if cell.mean is None:
        return f"diverged ({cell.num_diverged} of {total})"
    spread = "" if cell.sd is None else f" ± {100 * cell.sd:.1f}"
    diverged = f" ({cell.num_diverged} of {total} diverged)" if cell.num_diverged else ""
    return f"{100 * cell.mean:.1f}{spread} %{fits_range(cell.fits)}{diverged}"


def _chosen(rows: Sequence[Row], order: tables.Order, protection: str) -> list[Row]:
    return select(rows, protection, order.labelling, order.share)


def _accuracy_tables(rows: Sequence[Row], order: tables.Order) -> list[dict[str, Any]]:
    """One table per labelling and protection; of CLEAN alone where nothing is protected."""
    return [
        {"labelling": labelling, "protection": name, "rows": tables.accuracy_table(rows, order, name, labelling)}
        for labelling in order.labellings
        for name in order.protections or (CLEAN,)
    ]


def _colour(order: tables.Order, protection: str) -> str:
    if protection == CLEAN:
        return CLEAN_COLOUR
    return pictures.SERIES[order.protections.index(protection) % len(pictures.SERIES)]


def _variable(order: tables.Order, protection: str) -> str:
    if protection == CLEAN:
        return "clean"
    return pictures.SERIES_NAMES[order.protections.index(protection) % len(pictures.SERIES_NAMES)]


def _learning_panels(rows: Sequence[Row], order: tables.Order) -> list[tuple[str, bool, list[Panel]]]:
    """(target, whether expanded, panels by regime): accuracy by epoch on test (solid) and training batches (dashed)."""
    floor = tables.floors(rows, order)[order.labelling][0] if rows else None
    by_target: list[tuple[str, bool, list[Panel]]] = []
    for target in order.targets:
        made = []
        for regime in order.regimes:
            lines = [
                line
                for name in (CLEAN, *order.protections)
                for line in _learning_lines(_cell(rows, order, name, regime, target), _colour(order, name))
            ]
            if lines:
                title = f"Accuracy by epoch of {target} under {regime}"
                chart = pictures.curves(lines, title, label="accuracy", floor=floor)
                made.append(Panel(regime, describe_regime(regime), Markup(chart)))
        if made:
            by_target.append((target, not by_target or len(made) * len(order.targets) <= _OPEN_PANELS, made))
    return by_target


def _cell(rows: Sequence[Row], order: tables.Order, protection: str, regime: str, target: str) -> list[Row]:
    """Trials of one cell that have a history."""
    chosen = _chosen(rows, order, protection)
    return [row for row in chosen if (row["regime"], row["target"]) == (regime, target) and row.get("history")]


def _learning_lines(cell: Sequence[Row], colour: str) -> list[pictures.Line]:
    """Means over fits and seeds with a band of one SD; each diverged trial is a line of its own ending in a cross."""
    lines = []
    whole = [row for row in cell if not row["diverged"]]
    if whole:
        length = min(len(row["history"]) for row in whole)
        for name, is_dashed in (("accuracy_test", False), ("accuracy_train", True)):
            values = np.array([[float(score[name]) for score in row["history"][:length]] for row in whole])
            sd = values.std(0, ddof=1).tolist() if len(values) > 1 and not is_dashed else None
            end = None if is_dashed else float(np.mean([row["accuracy_last"] for row in whole]))
            x, y = range(1, length + 1), values.mean(0).tolist()
            lines.append(pictures.Line(x, y, colour, is_dashed=is_dashed, spread=sd, end=end))
    for row in cell:
        if row["diverged"]:
            accuracies = [float(score["accuracy_test"]) for score in row["history"]]
            x = range(1, len(accuracies) + 1)
            lines.append(pictures.Line(x, accuracies, colour, crosses=(len(accuracies) - 1,)))
    return lines


def _staged_panels(rows: Sequence[Row], order: tables.Order) -> list[tuple[str, str, list[Panel]]]:
    """(regime, target, panels) where epochs have an ACM: the first fit and seed; crosses mark rejected epochs."""
    sections = []
    for regime in order.regimes:
        for target in order.targets:
            lines: dict[str, list[pictures.Line]] = {"acm": [], "acm_raw": [], "count": []}
            for name in (CLEAN, *order.protections):
                cell = [r for r in _cell(rows, order, name, regime, target) if "acm" in r["history"][0]["figures"]]
                for row in cell[:1]:
                    for figure, made in lines.items():
                        made.append(_figure_line(row["history"], figure, _colour(order, name)))
            panels = [
                Panel(words, "", Markup(pictures.curves(lines[figure], title, label=label, is_accuracy=False)))
                for figure, label, words in (
                    ("acm", "ACM", "ACM of activations in two dimensions"),
                    ("acm_raw", "ACM", "ACM of unreduced activations"),
                    ("count", "count", "epochs rejected so far"),
                )
                if any(np.isfinite(line.y).any() for line in lines[figure])
                for title in [f"{words} by epoch, {target} under {regime}"]
            ]
            if panels:
                sections.append((regime, target, panels))
    return sections


def _figure_line(history: Sequence[Mapping[str, Any]], figure: str, colour: str) -> pictures.Line:
    """One of a regime's figures by epoch; a missing value leaves a gap."""
    values = [score["figures"].get(figure) for score in history]
    y = [float("nan") if value is None else float(value) for value in values]
    rejected = [i for i, score in enumerate(history) if score["figures"].get("rejected")] if figure != "count" else []
    return pictures.Line(range(1, len(y) + 1), y, colour, crosses=rejected, is_step=figure == "count")


def _activations(rows: Sequence[Row], order: tables.Order) -> list[dict[str, Any]]:
    """Pictures of ordinary training, the strongest regime and ST first, then of the others."""
    candidates: list[tuple[int, int, int, str, Row]] = []
    reached = {
        headline.protection: headline.found
        for headline in tables.headlines(rows, order)
        if headline.labelling == order.labelling and (headline.protection == CLEAN or headline.share == order.share)
    }
    for name in (CLEAN, *order.protections):
        most = reached.get(name)
        for row in _chosen(rows, order, name):
            if row.get("pictures"):
                is_most = most is not None and (row["regime"], row["target"]) == (most.regime, most.target)
                is_first = row["target"] == order.targets[0]
                is_nt, is_staged = row["regime"] == "nt", row["regime"].startswith("st")
                rank = 0 if is_nt and is_first else 1 if is_most else 2 if is_staged and is_first else 3
                candidates.append(
                    (rank, order.targets.index(row["target"]), order.regimes.index(row["regime"]), name, row)
                )
    candidates.sort(key=lambda candidate: candidate[:3])
    return [
        {"protection": _of_fit(rows, name, row), "row": row, "image": pictures.activations(row["pictures"])}
        for _, _, _, name, row in candidates[:SHOWN_ACTIVATIONS]
    ]


def _of_fit(rows: Sequence[Row], protection: str, row: Row) -> str:
    """'uc', or 'uc, fit 2' where there are several."""
    fits = {other.get("fit") for other in rows if other["protection"] == protection}
    return f"{protection}, fit {row['fit'] + 1}" if len(fits) > 1 else protection


def _share_kinds(rows: Sequence[Row], order: tables.Order) -> list[dict[str, Any]]:
    """For each kind of share: panels by regime and target, and the same figures as a table."""
    kinds = []
    for kind in ("samples", "classes"):
        curves = tables.share_curves(rows, order, kind)
        cells = dict.fromkeys((curve.regime, curve.target) for curve in curves)
        panels = []
        for regime, target in cells:
            lines = [_share_line(curve, order) for curve in curves if (curve.regime, curve.target) == (regime, target)]
            title = f"Accuracy over the protected share of {kind}, {target} under {regime}"
            floor = tables.floors(rows, order)[order.labelling][0]
            chart = pictures.curves(lines, title, label="accuracy", unit=f"protected share of {kind}", floor=floor)
            panels.append(Panel(regime, target if len(order.targets) > 1 else "", Markup(chart)))
        if curves:
            parts = sorted({part for curve in curves for part in curve.points})
            has_alone = any(curve.protection == CLEAN_PART for curve in curves)
            kinds.append({"kind": kind, "curves": curves, "parts": parts, "panels": panels, "has_alone": has_alone})
    return kinds


def _share_line(curve: tables.ShareCurve, order: tables.Order) -> pictures.Line:
    points = {part: cell for part, cell in curve.points.items() if cell.mean is not None}
    y = [cell.mean or 0.0 for cell in points.values()]
    spread = [cell.sd or 0.0 for cell in points.values()]
    is_alone = curve.protection == CLEAN_PART
    colour = INK if is_alone else _colour(order, curve.protection)
    return pictures.Line(list(points), y, colour, is_dashed=is_alone, has_dots=True, spread=spread)


def _data(rows: Sequence[Row], order: tables.Order) -> list[dict[str, Any]]:
    """The training data of each arm and share."""
    table = []
    arms = [(CLEAN, None)] + [(name, share) for share in order.shares for name in (*order.protections, CLEAN_PART)]
    for name, share in arms:
        chosen = [row for row in rows if row["protection"] == name and share in (None, row["share"])]
        if chosen:
            columns = {
                column: sorted({row[column] for row in chosen if row.get(column) is not None})
                for column in ("num_train", "num_protected", "num_test", "side", "data")
            }
            kind, part = parse_share(share) if share else ("samples", 0.0)
            table.append({"protection": name, "share": f"{percent(part)} of {kind}" if share else "none", **columns})
    return table
