"""What a sweep in Tune costs beside its trainings:  python tests/bench/bench_sweep.py

Eight small trials on two workers, from the start of the first to the end of the last, over half of the sum of the same
trials one after the other in this process, with as many threads as a worker has. 1 = two workers halve the time.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import numpy as np
import ray
import torch
from ratio import where, write

from actors.cluster.connect import connected, workers_for
from actors.trials import EvaluationData, run_trials
from jobs.evaluation.options import parse_evaluation
from pipeline.relearning.arms import Labels
from pipeline.relearning.collection import Collection
from pipeline.relearning.evaluation import CLEAN, Trial
from pipeline.relearning.trial import run_trial
from pipeline.shards.photographs import PHOTOGRAPHS, photograph
from pipeline.storage.store import Store

TRIALS, WORKERS, SIDE, EPOCHS, NEEDED = 8, 2, 32, 12, 1.25


def crops(count: int, seed: int) -> Collection:
    """Patches of ten photographs."""
    rng = np.random.default_rng(seed)
    sources = [pixels for pixels in map(photograph, PHOTOGRAPHS) if pixels.ndim == 3][:10]
    images, labels = np.zeros((count, 3, SIDE, SIDE), np.uint8), np.arange(count) % len(sources)
    for row, label in enumerate(labels):
        top, left = (int(rng.integers(0, size - SIDE)) for size in sources[label].shape[:2])
        images[row] = sources[label][top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)
    return Collection(images, labels.astype(np.int64), tuple(f"{seed}/{row:05d}" for row in range(count)))


def trials() -> list[Trial]:
    shared: dict[str, Any] = {"protection": CLEAN, "target": "small", "labelling": "original", "share": "samples:1"}
    shared |= {"epochs": EPOCHS, "recipe": "fast", "data": "bench", "labels": "bench"}
    return [Trial(regime="nt", seed=seed, **shared) for seed in range(TRIALS)]


def sweep(clean: Collection, test: Collection, labels: Labels, folder: str) -> tuple[float, int]:
    """Seconds from the first trial's start to the last one's end, and the threads of a worker."""
    given = ["--clean", "-", "--test", "-", "--output", folder, "--workers", str(WORKERS)]
    settings, ends = parse_evaluation(given), []
    with connected(settings):
        workers = workers_for(settings)
        data = EvaluationData(
            output=Store(folder),
            clean=ray.put(clean),
            test=ray.put(test),
            arms={},
            labels={"original": ray.put(labels)},
            facts={},
            everywhere=ray.put(np.ones(len(clean), bool)),
            holdout=0.05,
            side=SIDE,
            versions="",
            device=workers.device,
            threads=workers.threads,
        )
        run_trials(trials(), data, cpus=workers.cpus, gpus=workers.gpus, done=lambda trial: ends.append(time.time()))
        rows = Store(folder)
        started = [row_of(rows, trial)["started"] for trial in trials()]
    return max(ends) - min(started), workers.threads


def row_of(output: Store, trial: Trial) -> dict[str, float]:
    found: dict[str, float] = json.loads(output.read(trial.result))
    return found


def main() -> None:
    clean, test = crops(2_000, 0), crops(400, 1)
    labels = Labels(clean.labels, test.labels, 10)
    with tempfile.TemporaryDirectory(prefix="scumble-sweep-") as folder:
        together, threads = sweep(clean, test, labels, folder)
    torch.set_num_threads(threads)
    alone = []
    for trial in trials():
        started = time.perf_counter()
        run_trial(trial, clean, test, None, labels, holdout=0.05, device="cpu")
        alone.append(time.perf_counter() - started)
    ratio = together / (sum(alone) / WORKERS)
    print(
        f"sweep: {TRIALS} trials on {WORKERS} workers {together:.1f} s, one after the other {sum(alone):.1f} s, "
        f"ratio to a half {ratio:.3f} (needed <= {NEEDED}); load {where()['load']}"
    )
    write("sweep", {"together_s": together, "alone_s": alone, "ratio": ratio, "needed": NEEDED})


if __name__ == "__main__":
    main()
