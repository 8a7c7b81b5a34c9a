"""Where a stage's time goes: time per step and worker, as shares of the stage's duration."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.json_record import JsonRecord


class StepClock:
    """Seconds of each step of one thread.

    synchronise  called at the end of every step, to wait for work still pending on the device
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronise = synchronise

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to a step."""
        started = time.perf_counter()
        yield
        self._synchronise()
        self.seconds[name] += time.perf_counter() - started


@dataclass(frozen=True)
class Work:
    """What one worker did for one shard.

    worker   name of the process
    began    seconds since 1970
    ended    seconds since 1970
    seconds  step -> seconds in the worker's own thread; their sum is at most ended - began
    ahead    step -> seconds in other threads, summed
    threads  number of those threads
    """

    worker: str = ""
    began: float = 0.0
    ended: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    ahead: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1

    def spent(self) -> dict[str, float]:
        """Step -> seconds; those of other threads as if they had shared the work, and waiting for them is none."""
        own = {step: seconds for step, seconds in self.seconds.items() if step != "wait"}
        return _summed([own, {step: seconds / self.threads for step, seconds in self.ahead.items()}])


@dataclass(frozen=True)
class WorkerShares:
    """Where one worker's time went in one stage.

    seconds       duration of the stage
    images_per_s  between the worker's first and last shard
    shares        step -> share of the stage's duration, adding up to 1: `start` until the first shard, each step,
                  `other` within shards, `idle` between and after them
    threads       step -> share of the time of the read-ahead threads
    """

    stage: str
    worker: str
    images: int
    seconds: float
    images_per_s: float
    shares: Mapping[str, float]
    threads: Mapping[str, float]


@dataclass(frozen=True)
class ProfileRecord(JsonRecord):
    """profile.json: the workers of every stage, over all starts of a run."""

    workers: tuple[WorkerShares, ...] = ()


class Profile:
    """Collects the work of one stage.

    began  start of the stage, seconds since 1970; until its first shard, a worker is starting up
    """

    def __init__(self, stage: str, began: float) -> None:
        self.stage, self.began = stage, began
        self._work: defaultdict[str, list[tuple[Work, int]]] = defaultdict(list)

    def add(self, work: Work, images: int) -> None:
        """Record a finished shard and its number of images; ignores shards done before, which have no worker."""
        if work.worker:
            self._work[work.worker].append((work, images))

    def workers(self, ended: float) -> list[WorkerShares]:
        """Where each worker's time went until the end of the stage, given in seconds since 1970."""
        return [self._shares(worker, done, ended) for worker, done in sorted(self._work.items())]

    def _shares(self, worker: str, done: list[tuple[Work, int]], ended: float) -> WorkerShares:
        elapsed = max(ended - self.began, 1e-9)
        first, last = min(work.began for work, _ in done), max(work.ended for work, _ in done)
        busy = sum(work.ended - work.began for work, _ in done)
        steps, ahead = _summed(work.seconds for work, _ in done), _summed(work.ahead for work, _ in done)
        images = sum(count for _, count in done)
        spent = {"start": max(0.0, first - self.began), **steps, "other": max(0.0, busy - sum(steps.values()))}
        spent["idle"] = max(0.0, elapsed - sum(spent.values()))
        threads = max(work.threads for work, _ in done)
        return WorkerShares(
            stage=self.stage,
            worker=worker,
            images=images,
            seconds=round(elapsed, 3),
            images_per_s=round(images / max(last - first, 1e-9), 1),
            shares={step: round(value / elapsed, 4) for step, value in spent.items()},
            threads={step: round(value / elapsed / threads, 4) for step, value in ahead.items()},
        )


def as_text(workers: Sequence[WorkerShares]) -> str:
    """One stage's workers as a text table, with shares in per cent."""
    named = dict.fromkeys(step for worker in workers for step in worker.shares)
    steps = [step for step in named if step not in ("other", "idle")] + ["other", "idle"]
    ahead = list(dict.fromkeys(step for worker in workers for step in worker.threads))
    lines = [["worker", "images", "images/s", *steps, *(f"{step}*" for step in ahead)]]
    for worker in workers:
        shares = [worker.shares.get(step, 0.0) for step in steps] + [worker.threads.get(step, 0.0) for step in ahead]
        counts = [f"{worker.images:,}", f"{worker.images_per_s:,.0f}"]
        lines.append([worker.worker[:8], *counts, *(f"{share:.1%}" for share in shares)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(table + (["* in threads that read and decode ahead"] if ahead else []))


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        for step, seconds in part.items():
            total[step] += seconds
    return dict(total)
