"""Rows of finished trials: Parquet conversion, means over fits and seeds, and relearned accuracy."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import unreadable
from pipeline.hashing import canonical
from pipeline.relearning.evaluation import CLEAN, COMPUTATION, TRIALS, Trial

if TYPE_CHECKING:
    from pipeline.storage.store import Store

Row = Mapping[str, Any]  # a result of pipeline.relearning.trial.run_trial, plus overlap and denoiser columns

_TEXT = (
    *("key", "protection", "target", "regime", "labelling", "share", "recipe", "data", "device", "versions"),
    "settings",
)
_WHOLE = ("fit", "seed", "epochs", "side", "num_train", "num_protected", "num_test", "num_holdout", "num_classes")
_REAL = (
    *("accuracy_last", "accuracy_best", "accuracy_early_stop", "accuracy_own_delta", "accuracy_wrong_delta"),
    *("accuracy_holdout", "accuracy_train", "majority", "purity", "adjusted_mutual_information", "shortcut_accuracy"),
    *("sse", "silhouette", "calinski_harabasz"),
    *("denoiser_own_db", "denoiser_here_db"),
    *("images_per_second", "seconds"),
)
SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in _TEXT]
    + [pa.field(name, pa.int64()) for name in _WHOLE]
    + [pa.field(name, pa.float64()) for name in _REAL]
    + [pa.field("diverged", pa.bool_())]
)
HISTORY_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("epoch", pa.int64()),
        *(pa.field(n, pa.float64()) for n in ("loss", "accuracy_train", "accuracy_test", "accuracy_holdout")),
        pa.field("figures", pa.string()),
    ]
)


_NEEDED = ("accuracy_last", "diverged", "num_train", "num_classes", "seconds")


@dataclass(frozen=True)
class MeanAccuracy:
    """Last-epoch accuracy over the fits and seeds of one cell, in [0, 1]; diverged trials are excluded.

    mean    mean of the fits' means; None if every trial diverged
    sd      sample standard deviation over the seeds of a fit, pooled over fits; None for fewer than two seeds
    fits    mean over seeds of each fit that has one, in order
    """

    mean: float | None
    sd: float | None
    num_trials: int
    num_diverged: int = 0
    fits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Relearned:
    """Relearned accuracy: the largest mean over regimes and targets, and where it was reached (see MeanAccuracy)."""

    accuracy: float
    sd: float | None
    regime: str
    target: str
    num_regimes: int
    fits: tuple[float, ...] = ()


def read_row(output: Store, trial: Trial) -> dict[str, Any]:
    """The row of a finished trial. Raises InputError for a file that is damaged or belongs to another trial."""
    data, expected = output.read(trial.result), asdict(trial) | {"key": trial.key}
    try:
        row: dict[str, Any] = json.loads(data)
        if {name: row[name] for name in expected} != expected:
            raise ValueError("it belongs to another trial")
        if missing := [name for name in _NEEDED if row[name] is None]:
            raise ValueError(f"{missing[0]} is null")
        results_to_parquet([row])
        histories_to_parquet([row])
        return row
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        where = f"{output.url}/{trial.result}"
        raise unreadable(where, error, "restore it, or delete it to run that trial again") from None


def outdated(trials: Sequence[Trial], output: Store) -> int:
    """How many of the planned trials have a row in the output that an earlier COMPUTATION left, under another key."""
    planned = {canonical(asdict(trial)) for trial in trials}
    others = set(output.names(TRIALS)) - {trial.result for trial in trials}
    names = [each.name for each in fields(Trial)]
    found = set()
    for name in sorted(others):
        if not name.endswith(".json"):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(output.read(name))
            if row.get("computation", 1) != COMPUTATION:
                found.add(canonical({name: row[name] for name in names}))
    return len(found & planned)


def results_to_parquet(rows: Sequence[Row]) -> bytes:
    """One row per trial, with SCHEMA's columns, sorted for easy comparison."""
    names = ("protection", "labelling", "share", "target", "regime", "fit", "seed")
    ordered = sorted(rows, key=lambda row: tuple(row[name] for name in names))
    return _parquet([{name: row.get(name) for name in SCHEMA.names} for row in ordered], SCHEMA)


def results_from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The inverse of results_to_parquet: one dict per row."""
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


def histories_to_parquet(rows: Sequence[Row]) -> bytes:
    """One row per trial and epoch, with HISTORY_SCHEMA's columns; a regime's own figures are JSON in `figures`."""
    epochs = [
        {**score, "key": row["key"], "epoch": epoch, "figures": _json(score["figures"])}
        for row in sorted(rows, key=lambda row: str(row["key"]))
        for epoch, score in enumerate(row["history"], start=1)
    ]
    return _parquet([{name: row.get(name) for name in HISTORY_SCHEMA.names} for row in epochs], HISTORY_SCHEMA)


def _json(figures: Mapping[str, float]) -> str:
    """Non-finite figures become null: NaN is not valid JSON, and strict readers reject it."""
    return json.dumps(
        {name: value if math.isfinite(value) else None for name, value in figures.items()}, sort_keys=True
    )


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file.getvalue()


def mean_accuracies(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], MeanAccuracy]:
    """Mean and spread of `accuracy_last` over fits and seeds, for every combination of the columns `by`."""
    cells: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in by)].append(row)
    return {cell: _mean_accuracy(trials) for cell, trials in cells.items()}


def _mean_accuracy(rows: Sequence[Row]) -> MeanAccuracy:
    reached: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if not row["diverged"]:
            reached[row["fit"]].append(float(row["accuracy_last"]))
    if not reached:
        return MeanAccuracy(None, None, 0, len(rows))
    fits = tuple(float(np.mean(reached[fit])) for fit in sorted(reached))
    num_trials = sum(map(len, reached.values()))
    free = num_trials - len(fits)  # degrees of freedom
    squares = sum(
        float(np.sum(np.square(np.subtract(accuracies, np.mean(accuracies))))) for accuracies in reached.values()
    )
    sd = math.sqrt(squares / free) if free else None
    return MeanAccuracy(float(np.mean(fits)), sd, num_trials, len(rows) - num_trials, fits)


def relearned(
    rows: Sequence[Row], protection: str, *, labelling: str = "original", share: str = "samples:1"
) -> Relearned | None:
    """The worst case over regimes and targets of the mean over fits and seeds; None if no trial finished.

    For CLEAN, the same maximum for the control, whatever the share.
    """
    cells = _cells(rows, protection, labelling, share)
    reached = {cell: mean for cell, mean in cells.items() if mean.mean is not None}
    if not reached:
        return None
    worst = max(reached, key=lambda cell: reached[cell].mean or 0.0)
    best = reached[worst]
    regime, target = worst
    return Relearned(best.mean or 0.0, best.sd, regime, target, len({regime for regime, _ in cells}), best.fits)


def relearned_by_regime(
    rows: Sequence[Row], protection: str, *, labelling: str = "original", share: str = "samples:1"
) -> dict[str, float]:
    """Regime -> accuracy of its best target, mean over fits and seeds; omits regimes whose trials all diverged."""
    best: dict[str, float] = {}
    for (regime, _), cell in _cells(rows, protection, labelling, share).items():
        if cell.mean is not None:
            best[regime] = max(cell.mean, best.get(regime, 0.0))
    return best


def select(rows: Sequence[Row], protection: str, labelling: str, share: str) -> list[Row]:
    """Rows of one protection; those of the clean control match every share."""
    return [
        row
        for row in rows
        if row["protection"] == protection
        and row["labelling"] == labelling
        and (protection == CLEAN or row["share"] == share)
    ]


def _cells(rows: Sequence[Row], protection: str, labelling: str, share: str) -> dict[tuple[Any, ...], MeanAccuracy]:
    """The mean for every regime and target."""
    return mean_accuracies(select(rows, protection, labelling, share), ("regime", "target"))
