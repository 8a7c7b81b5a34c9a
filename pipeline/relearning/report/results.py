"""Rows of finished trials: to Parquet and back, means over fits and seeds, and the one figure of a protection."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import unreadable
from pipeline.relearning.evaluation import CLEAN, Trial

if TYPE_CHECKING:
    from pipeline.storage.store import Store

Row = Mapping[str, Any]  # what pipeline.relearning.trial.run_trial returns, with its labelling's overlap

_TEXT = (
    *("key", "protection", "target", "regime", "labelling", "share", "recipe", "data", "device", "versions"),
    "settings",
)
_WHOLE = ("fit", "seed", "epochs", "side", "num_train", "num_protected", "num_test", "num_classes")
_REAL = (
    *("accuracy_last", "accuracy_best", "accuracy_early_stop", "accuracy_own_delta", "accuracy_wrong_delta"),
    *("accuracy_train", "majority", "purity", "adjusted_mutual_information", "shortcut_accuracy"),
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
    """Accuracy after the last epoch over the fits and seeds of one cell, in [0, 1]; diverged trials are not averaged.

    mean    mean of the fits' means; None if every trial diverged
    sd      over the seeds of a fit: sample standard deviation, pooled over fits; None for fewer than two seeds
    fits    mean over seeds of every fit that has one, in order
    """

    mean: float | None
    sd: float | None
    num_trials: int
    num_diverged: int = 0
    fits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Relearned:
    """Relearned accuracy: the largest mean over regimes and targets, and where it was reached; see MeanAccuracy."""

    accuracy: float
    sd: float | None
    regime: str
    target: str
    num_regimes: int
    fits: tuple[float, ...] = ()


def read_row(output: Store, trial: Trial) -> dict[str, Any]:
    """The row of a finished trial. Raises InputError, one line, for a file that is damaged or another trial's."""
    data, expected = output.read(trial.result), asdict(trial) | {"key": trial.key}
    try:
        row: dict[str, Any] = json.loads(data)
        if {name: row[name] for name in expected} != expected:
            raise ValueError("it is of another trial")
        if missing := [name for name in _NEEDED if row[name] is None]:
            raise ValueError(f"{missing[0]} is null")
        results_to_parquet([row])
        histories_to_parquet([row])
        return row
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        where = f"{output.url}/{trial.result}"
        raise unreadable(where, error, "restore it, or remove it to run that trial again") from None


def results_to_parquet(rows: Sequence[Row]) -> bytes:
    """One row per trial, in SCHEMA's columns, ordered by what a reader compares."""
    names = ("protection", "labelling", "share", "target", "regime", "fit", "seed")
    ordered = sorted(rows, key=lambda row: tuple(row[name] for name in names))
    return _parquet([{name: row.get(name) for name in SCHEMA.names} for row in ordered], SCHEMA)


def results_from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The inverse of results_to_parquet: a dict for each row."""
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


def histories_to_parquet(rows: Sequence[Row]) -> bytes:
    """One row per trial and epoch, in HISTORY_SCHEMA's columns; what a regime adds is JSON in `figures`."""
    found = [
        {**score, "key": row["key"], "epoch": epoch, "figures": _json(score["figures"])}
        for row in sorted(rows, key=lambda row: str(row["key"]))
        for epoch, score in enumerate(row["history"], start=1)
    ]
    return _parquet([{name: one.get(name) for name in HISTORY_SCHEMA.names} for one in found], HISTORY_SCHEMA)


def _json(figures: Mapping[str, float]) -> str:
    """Figures that are not finite become null: NaN is no JSON, and strict readers refuse it."""
    return json.dumps(
        {name: value if math.isfinite(value) else None for name, value in figures.items()}, sort_keys=True
    )


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file.getvalue()


def mean_accuracies(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], MeanAccuracy]:
    """Mean and spread over fits and seeds of `accuracy_last` for every combination of the columns `by` that occurs."""
    cells: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in by)].append(row)
    return {cell: _mean_accuracy(found) for cell, found in cells.items()}


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
    squares = sum(float(np.sum(np.square(np.subtract(one, np.mean(one))))) for one in reached.values())
    sd = math.sqrt(squares / free) if free else None
    return MeanAccuracy(float(np.mean(fits)), sd, num_trials, len(rows) - num_trials, fits)


def relearned(
    rows: Sequence[Row], protection: str, *, labelling: str = "original", share: str = "samples:1"
) -> Relearned | None:
    """The worst case over regimes and targets of the mean over fits and seeds; None without a single finished trial.

    For CLEAN it is the control's same maximum, whatever the share.
    """
    cells = _cells(rows, protection, labelling, share)
    reached = {cell: found for cell, found in cells.items() if found.mean is not None}
    if not reached:
        return None
    worst = max(reached, key=lambda cell: reached[cell].mean or 0.0)
    best = reached[worst]
    regime, target = worst
    return Relearned(best.mean or 0.0, best.sd, regime, target, len({regime for regime, _ in cells}), best.fits)


def relearned_by_regime(
    rows: Sequence[Row], protection: str, *, labelling: str = "original", share: str = "samples:1"
) -> dict[str, float]:
    """Regime -> accuracy of its best target, mean fits and seeds; regimes whose trials all diverged are left out."""
    found: dict[str, float] = {}
    for (regime, _), cell in _cells(rows, protection, labelling, share).items():
        if cell.mean is not None:
            found[regime] = max(cell.mean, found.get(regime, 0.0))
    return found


def select(rows: Sequence[Row], protection: str, labelling: str, share: str) -> list[Row]:
    """Rows of one protection; the clean control stands beside every share."""
    return [
        row
        for row in rows
        if row["protection"] == protection
        and row["labelling"] == labelling
        and (protection == CLEAN or row["share"] == share)
    ]


def _cells(rows: Sequence[Row], protection: str, labelling: str, share: str) -> dict[tuple[Any, ...], MeanAccuracy]:
    """The mean of every regime and target."""
    return mean_accuracies(select(rows, protection, labelling, share), ("regime", "target"))
