"""Holds a protection and its surrogate: one unit of new uploads in, the content of its commit out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch

from actors.cluster.attendance import PATIENCE_SECONDS, Book, Patience, Silence, attendance, signing, told_to
from actors.cluster.failures import Failure
from actors.cluster.metrics import actor_recorder
from actors.cluster.placement import Workers
from pipeline.errors import ClusterError
from pipeline.uploads.deltas import deltas_from
from pipeline.uploads.transaction import Places, UnitResult, protect_unit
from pipeline.uploads.units import Unit

RESTARTS = 3
_WAITING = 2  # units per actor: one in work, one queued
_SILENCES = 3  # in a row before the run gives up


@dataclass(frozen=True)
class UploaderContext:
    """What every actor needs.

    key      secret of a texture, in memory only
    weights  file of the surrogate's weights, on every node; None: where its library keeps them
    """

    places: Places
    protection: bytes
    key: bytes | None = field(default=None, repr=False)
    weights: str | None = None


class Uploader:
    """Ray actor. The commit itself is left to the holder of the lease."""

    def __init__(self, context: UploaderContext, device: str, threads: int, book: Book) -> None:
        self._places, self._threads, self._book = context.places, threads, book
        self._failure: Failure | None = None
        actor_recorder("uploads")  # counts a process that replaces a dead one
        try:
            with signing(book, ""):
                torch.set_num_threads(threads)
                weights = Path(context.weights) if context.weights else None
                small = context.places.settings.small_images
                self._deltas = deltas_from(
                    context.protection, key=context.key, weights=weights, device=device, small_images=small
                )
        except Exception as error:  # raised here, Ray would print its traceback
            self._failure = Failure.of(error, "")

    def protect(self, unit: Unit) -> UnitResult | Failure:
        """Write the objects of a unit to the output, but not its commit. A failure is returned, not raised."""
        if self._failure is not None:
            return self._failure
        name = unit.items[0].name
        try:
            with signing(self._book, name):
                return protect_unit(unit, self._places, self._deltas, threads=self._threads)
        except Exception as error:
            return Failure.of(error, name)


def over_units(units: Iterator[Unit], context: UploaderContext, workers: Workers) -> Iterator[UnitResult]:
    """Spread units over actors; yields results as they come, and takes no more of `units` than actors wait for.

    Lost units are submitted again: a unit may be processed twice, and committing it is left to the caller. Raises the
    failure of a worker, or ClusterError if nothing helps, so that the caller does not hold its lease for nothing.
    """
    book, silences = attendance(), 0
    while True:
        pool = _Pool(book, context, workers)
        try:
            for result in pool.over(units):
                silences = 0
                yield result
            return
        except Silence as silence:
            silences += 1
            if silences == _SILENCES:
                advice = "check what is using the CPUs of the cluster; the next run continues"
                raise ClusterError(f"{silence}, {_SILENCES} times in a row: {advice}") from None
            units = chain(pool.asked, units)
        finally:
            pool.close()


class _Pool:
    """Actors, and the units submitted to them."""

    def __init__(self, book: Book, context: UploaderContext, workers: Workers) -> None:
        options: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus or None}
        actor = ray.remote(max_restarts=RESTARTS, max_task_retries=-1, **options)(Uploader)
        self._book = book
        self._actors = [actor.remote(context, workers.device, workers.threads, book) for _ in range(workers.count)]
        self._working: dict[Any, tuple[Any, Unit]] = {}

    @property
    def asked(self) -> list[Unit]:
        """Units without a result."""
        return [unit for _, unit in self._working.values()]

    def over(self, units: Iterator[Unit]) -> Iterator[UnitResult]:
        """Yields results. Raises Silence if some are missing and no worker is busy."""
        patience, free = Patience(self._book, PATIENCE_SECONDS), self._actors * _WAITING
        while True:
            while free and (unit := next(units, None)) is not None:
                actor = free.pop(0)
                self._working[actor.protect.remote(unit)] = (actor, unit)
                self._book.sign()  # there may have been nothing to do for long
            if not self._working:
                return
            for done in ray.wait(list(self._working), timeout=PATIENCE_SECONDS / 10)[0]:
                with told_to(self._book):
                    result = ray.get(done)
                if isinstance(result, Failure):
                    raise result.error()
                free.append(self._working.pop(done)[0])
                yield result
                break
            else:
                patience.check()

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
