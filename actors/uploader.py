"""Holds a protection and its surrogate: one unit of new uploads in, what its commit will say out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from actors.connect import Workers
from actors.metrics import actor_recorder
from pipeline.uploads.deltas import deltas_from
from pipeline.uploads.transaction import Places, UnitResult, protect_unit
from pipeline.uploads.units import Unit

RESTARTS = 3
_WAITING = 2  # units of each actor: one in work, one at hand


@dataclass(frozen=True)
class UploaderContext:
    """What every actor needs.

    key      secret of a texture, in memory only
    weights  file of the surrogate's weights, on every node; None = where its library keeps them
    """

    places: Places
    protection: bytes
    key: bytes | None = field(default=None, repr=False)
    weights: str | None = None


class Uploader:
    """Ray actor; can be built and called without Ray. The commit itself stays with whoever holds the lease."""

    def __init__(self, context: UploaderContext, device: str = "cpu", threads: int = 1) -> None:
        weights = Path(context.weights) if context.weights else None
        torch.set_num_threads(threads)
        self._places, self._threads = context.places, threads
        actor_recorder("uploads")  # counts a process that replaces a dead one
        small = context.places.settings.small_images
        self._deltas = deltas_from(
            context.protection, key=context.key, weights=weights, device=device, small_images=small
        )

    def protect(self, unit: Unit) -> UnitResult:
        """The unit's objects are in the output; its commit is not."""
        return protect_unit(unit, self._places, self._deltas, threads=self._threads)


def over_units(units: Iterator[Unit], context: UploaderContext, workers: Workers) -> Iterator[UnitResult]:
    """Units spread over actors, answers as they come; only so many are taken from `units` as actors wait for."""
    options: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus or None}
    actor = ray.remote(max_restarts=RESTARTS, max_task_retries=-1, **options)(Uploader)
    pool = [actor.remote(context, workers.device, workers.threads) for _ in range(workers.count)]
    working: dict[Any, Any] = {}
    try:
        for free in pool * _WAITING:
            if (unit := next(units, None)) is not None:
                working[free.protect.remote(unit)] = free
        while working:
            (done,), _ = ray.wait(list(working), num_returns=1)
            free = working.pop(done)
            yield ray.get(done)
            if (unit := next(units, None)) is not None:
                working[free.protect.remote(unit)] = free
    finally:
        for one in pool:
            ray.kill(one)
