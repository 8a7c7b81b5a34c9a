"""Tasks over parts of the work: results as they come, failures as data, lost ones again; and objects of other nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from actors.cluster.attendance import Book, Patience, signing, until_answered
from pipeline.errors import ClusterError

OBJECT_SECONDS = 600.0  # for the next of several objects that other nodes hold


def over_tasks(task: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, cpus: float) -> Iterator[tuple[int, Any]]:
    """Run a task for each tuple of arguments; yields its place in `calls` and a reference to its value, as they end.

    A task may run twice, at any time. Raises the ScumbleError that a task has reported, else ClusterError.
    """
    left = dict(enumerate(calls))
    yield from until_answered(left, "tasks", partial(_answers, task, left, cpus))


def objects_of(references: Sequence[Any]) -> list[Any]:
    """The objects behind the references, in order, however long it takes as long as some arrive.

    Raises ClusterError if none of those that are missing has come for ten minutes.
    """
    missing = list(references)
    while missing:
        came, missing = ray.wait(missing, num_returns=len(missing), timeout=OBJECT_SECONDS)
        if not came:
            raise ClusterError(
                f"{len(missing)} of {len(references)} objects of other nodes have not come, and none has for "
                f"{OBJECT_SECONDS:.0f} s; check the network of the cluster, then run the same command again"
            )
    return list(ray.get(list(references)))


def _answers(
    task: Callable[..., Any],
    left: dict[int, tuple[Any, ...]],
    cpus: float,
    book: Book,
    patience_s: float,
    every_s: float,
) -> Iterator[tuple[int, Any]]:
    """Submit what is left and take out of it what ends. Raises Silence if some do not and no task is running."""
    remote = ray.remote(_attended).options(num_cpus=cpus, num_returns=2, name=task.__name__)
    working: dict[Any, tuple[int, Any]] = {}
    for number, arguments in left.items():
        value, receipt = remote.remote(book, every_s, task, *arguments)
        working[receipt] = number, value
    patience = Patience(book, patience_s)
    try:
        while working:
            if not ray.wait(list(working), timeout=patience_s / 10)[0]:
                patience.check()
                continue
            for receipt in ray.wait(list(working), num_returns=len(working), timeout=0)[0]:
                ray.get(receipt)  # raises what the task raises; its value stays where it is
                number, value = working.pop(receipt)
                del left[number]
                yield number, value
    finally:
        _cancel(working)


def _attended(book: Book, every_s: float, task: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
    with signing(book, "", every_s):
        return task(*arguments), True


def _cancel(working: Mapping[Any, Any]) -> None:
    """A task that is stuck would keep its CPU."""
    for receipt in working:
        with contextlib.suppress(RayError, ValueError, TypeError):
            ray.cancel(receipt, force=True)
