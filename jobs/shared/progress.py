"""Live bars on a terminal, one line per step otherwise, and a file for `status`.

All show rate, time left, what was rejected, and the step in which the workers spend most of their time.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from actors.cluster.metrics import recorder
from pipeline import layout
from pipeline.errors import ScumbleError
from pipeline.metrics import QUEUE_DEPTH, Recorder, report_progress
from pipeline.runs.run_record import StageProgress
from pipeline.storage.store import Store

WRITTEN_EVERY = 5.0  # seconds


class Progress:
    """Progress of one stage over `total` units (shards, or per cent of a fit).

    output    of the run, where `file` is kept up to date; None: no file
    is_whole  False while more units may be found, so that nobody can tell the time left
    """

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        output: Store | None = None,
        file: str = layout.PROGRESS,
        metrics: Recorder | None = None,
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.is_whole = True
        self.done = self.images = self.rejected = 0
        self.started = time.monotonic()
        self._steps: Counter[str] = Counter()
        self._output, self._file, self._written = output, file, self.started
        self.metrics = metrics or recorder()
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=stage, unit=unit, file=sys.stderr, dynamic_ncols=True) if live else None

    def found(self, total: int, *, is_whole: bool) -> None:
        """So many units were found so far, done ones included."""
        self.total, self.is_whole = total, is_whole
        if self._bar is not None:
            self._bar.total = total

    def step(
        self,
        name: str,
        *,
        units: int = 1,
        images: int = 0,
        rejected: int = 0,
        spent: Mapping[str, float] | None = None,
    ) -> None:
        """Another unit is done.

        name   of the shard or cluster
        spent  step -> seconds that a worker spent on it
        """
        self.done += units
        self.images += images
        self.rejected += rejected
        self._steps.update(spent or {})
        report_progress(self.metrics, self.stage, self.total - self.done)
        if time.monotonic() - self._written >= WRITTEN_EVERY:
            self.write()
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(), refresh=False)
            self._bar.update(units)
            return
        parts = [f"stage={self.stage}", f"done={self.done}/{self.total}", f"{self.unit}={name}"]
        if images or rejected:
            parts += [f"images={images}", f"rejected={rejected}", f"rate={self.rate:.0f}/s"]
        slowest = [f"slowest={step}:{share:.0%}" for step, share in self.shares.items()][:1]
        left = self.seconds_left
        print(*parts, "eta=?" if left is None else f"eta={left:.0f}s", *slowest, file=sys.stderr, flush=True)

    def _postfix(self) -> str:
        parts = [f"{self.rate:,.0f} images/s"] if self.images else []
        parts += [f"{self.rejected:,} quarantined"] if self.rejected else []
        parts += [f"{step} {share:.0%} of the time" for step, share in self.shares.items()][:1]
        return ", ".join(parts)

    @property
    def rate(self) -> float:
        """Images per second so far."""
        return self.images / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None while more units may be found."""
        if not self.is_whole:
            return None
        elapsed = time.monotonic() - self.started
        return elapsed / max(self.done, 1) * (self.total - self.done)

    @property
    def shares(self) -> dict[str, float]:
        """Step -> share of what the workers spent in all steps so far, largest first."""
        total = sum(self._steps.values())
        return {step: round(seconds / total, 3) for step, seconds in self._steps.most_common() if total > 0}

    def write(self) -> None:
        """Write the file, unless the store fails: what a run does is worth more than what it shows."""
        self._written = time.monotonic()
        if self._output is None or not self.total:
            return
        left = self.seconds_left
        record = StageProgress(
            stage=self.stage,
            unit=self.unit,
            done=self.done,
            total=self.total,
            images=self.images,
            quarantined=self.rejected,
            rate=round(self.rate, 2),
            eta=None if left is None else round(left, 1),
            steps=self.shares,
            updated=round(time.time(), 1),
        )
        with contextlib.suppress(ScumbleError):
            self._output.put(self._file, record.to_bytes())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def progress(
    stage: str,
    total: int,
    unit: str = "shard",
    output: Store | None = None,
    file: str = layout.PROGRESS,
    metrics: Recorder | None = None,
) -> Iterator[Progress]:
    """A Progress that is closed however the stage ends.

    metrics  where it is reported; None: to the cluster that this process is in
    """
    shown = Progress(stage, total, unit, output, file, metrics)
    try:
        yield shown
        shown.write()
        shown.metrics.record(QUEUE_DEPTH, 0, stage=stage)
    finally:
        shown.close()
