"""Which of a regime's options an adversary would choose, who has some clean images but not the test images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.relearning.evaluation import CLEAN
from pipeline.relearning.regime_names import FILTER_NAMES
from pipeline.relearning.report.results import MeanAccuracy, Row, mean_accuracies, select
from pipeline.relearning.report.tables import Order


@dataclass(frozen=True)
class Choice:
    """The choice among the options of one regime, for one protection and target (Dang et al. 2023, section IV-C4).

    There it is made on 20 test images; here on clean images that are taken out of training and are no test images.

    base         the regime without its options
    tried        how many of its options were tried
    chosen       the one with the largest accuracy on held-out images after training, mean over fits and seeds;
                 of equal ones the first in display order
    num_holdout  held-out images; None where it was not recorded
    holdout      accuracy on them, in [0, 1]
    reached      of the chosen one on the test images
    oracle       the largest such accuracy of all that were tried, in [0, 1]; no adversary can know which that is
    """

    protection: str
    base: str
    target: str
    tried: int
    chosen: str
    num_holdout: int | None
    holdout: float
    reached: MeanAccuracy
    oracle: float


def base_of(regime: str) -> str:
    """'iss-gray+st-cg[kappa=2]' -> 'iss-gray+st-cg'; 'lowpass:8' -> 'lowpass'.

    The number of a regime like 'leaked-pairs:16' stays: it is what an adversary has, not what he chooses.
    """
    cutoffs = "|".join(FILTER_NAMES)
    return re.sub(rf"\b({cutoffs}):[^+]*", r"\1", re.sub(r"\[[^]]*\]", "", regime))


def choices(rows: Sequence[Row], order: Order) -> list[Choice]:
    """A Choice for each regime of which several options were tried; diverged trials count for none of them."""
    options: defaultdict[str, list[str]] = defaultdict(list)
    for regime in order.regimes:
        options[base_of(regime)].append(regime)
    table = []
    for name in (*order.protections, CLEAN):
        selected = [row for row in select(rows, name, order.labelling, order.share) if not row["diverged"]]
        for base, regimes in options.items():
            for target in order.targets:
                cells = {
                    regime: [r for r in selected if (r["regime"], r["target"]) == (regime, target)]
                    for regime in regimes
                }
                if choice := _choice(name, base, target, cells):
                    table.append(choice)
    return table


def _choice(protection: str, base: str, target: str, cells: dict[str, list[Row]]) -> Choice | None:
    """None unless two options or more have accuracies on held-out images."""
    seen = {regime: _holdout(rows) for regime, rows in cells.items()}
    known = {regime: accuracy for regime, accuracy in seen.items() if accuracy is not None}
    if len(known) < 2:
        return None
    chosen = max(known, key=lambda regime: known[regime])  # the first of equal ones
    reached = mean_accuracies([row for regime in known for row in cells[regime]], ("regime",))
    return Choice(
        protection=protection,
        base=base,
        target=target,
        tried=len(known),
        chosen=chosen,
        num_holdout=cells[chosen][0].get("num_holdout"),
        holdout=known[chosen],
        reached=reached[(chosen,)],
        oracle=max(cell.mean or 0.0 for cell in reached.values()),
    )


def _holdout(rows: Sequence[Row]) -> float | None:
    """Accuracy on held-out images of the network that was tested, mean over fits and seeds; None unless all have it."""
    known = [float(row["accuracy_holdout"]) for row in rows if row.get("accuracy_holdout") is not None]
    return float(np.mean(known)) if known and len(known) == len(rows) else None
