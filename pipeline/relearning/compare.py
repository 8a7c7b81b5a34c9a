"""Clean against protected under several regimes: what a target relearns, in as many processes as asked for."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch

from pipeline.relearning.collection import Collection
from pipeline.relearning.regimes import Knowledge, find_regime
from pipeline.relearning.train import train_target

Progress = Callable[[str], None]


def compare(
    clean: Collection,
    protected: Collection,
    test: Collection,
    regimes: Sequence[str],
    *,
    known: Knowledge,
    epochs: int,
    seeds: Sequence[int],
    processes: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Last-epoch accuracies on clean test images, as JSON: {rows: [{regime, clean, protected}], chance, setup}.

    Every regime is run on the clean images as well: its own control. progress is called with each finished trial.
    """
    trials = [(regime, which, seed) for regime in regimes for which in ("clean", "protected") for seed in seeds]
    accuracies: dict[tuple[str, str, int], float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_share, initargs=(clean, protected, test)
    ) as pool:
        futures = {pool.submit(_trial, *trial, known, epochs): trial for trial in trials}
        for future in as_completed(futures):
            accuracies[futures[future]] = future.result()
            if progress is not None:
                regime, which, seed = futures[future]
                progress(f"{regime} on {which}, seed {seed}: {future.result():.1%}")
    rows = [
        {"regime": regime} | {w: [accuracies[regime, w, seed] for seed in seeds] for w in ("clean", "protected")}
        for regime in regimes
    ]
    counts = np.bincount(test.labels, minlength=test.num_classes)
    setup = (
        f"A small residual network from random weights, {epochs} epochs on {len(clean.images):,} images, last epoch, "
        f"{len(test.images):,} clean test images, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."
    )
    return {"rows": rows, "chance": float(counts.max()) / len(test.labels), "setup": setup}


_SHARED: dict[str, Collection] = {}


def _share(clean: Collection, protected: Collection, test: Collection) -> None:
    torch.set_num_threads(1)
    _SHARED.update(clean=clean, protected=protected, test=test)


def _trial(regime: str, which: str, seed: int, known: Knowledge, epochs: int) -> float:
    train, test = _SHARED[which], _SHARED["test"]
    score = train_target(
        torch.from_numpy(train.images),
        torch.from_numpy(train.labels),
        torch.from_numpy(test.images),
        torch.from_numpy(test.labels),
        regime=find_regime(regime, known),
        epochs=epochs,
        seed=seed,
    )
    return score.accuracy_last
