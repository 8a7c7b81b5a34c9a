"""Live bars on a terminal, one line per step otherwise; both show rate and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from actors.cluster.metrics import recorder
from pipeline.metrics import QUEUE_DEPTH, report_progress


class Progress:
    """Progress of one stage over `total` units (shards, or per cent of a fit)."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.images = 0
        self.started = time.monotonic()
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=stage, unit=unit, file=sys.stderr, dynamic_ncols=True) if live else None

    def step(self, name: str, *, units: int = 1, images: int = 0, rejected: int = 0) -> None:
        """Another unit is done.

        name  of the shard or cluster
        """
        self.done += units
        self.images += images
        report_progress(recorder(), self.stage, self.total - self.done)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.rate:,.0f} images/s" if self.images else "", refresh=False)
            self._bar.update(units)
            return
        parts = [f"stage={self.stage}", f"done={self.done}/{self.total}", f"{self.unit}={name}"]
        if images or rejected:
            parts += [f"images={images}", f"rejected={rejected}", f"rate={self.rate:.0f}/s"]
        print(*parts, f"eta={self.seconds_left:.0f}s", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Images per second so far."""
        return self.images / max(time.monotonic() - self.started, 1e-9)

    @property
    def seconds_left(self) -> float:
        elapsed = time.monotonic() - self.started
        return elapsed / max(self.done, 1) * (self.total - self.done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def progress(stage: str, total: int, unit: str = "shard") -> Iterator[Progress]:
    """A Progress that is closed however the stage ends."""
    shown = Progress(stage, total, unit)
    try:
        yield shown
        recorder().record(QUEUE_DEPTH, 0, stage=stage)
    finally:
        shown.close()
