"""Heartbeats: workers sign while they are busy, so that a slow one can be told from one that is gone.

Ray can lose a result for good, mostly when a node is cut off for a moment: a task or a message vanishes and nobody is
told (ray-project/ray issues 44357, 62535, 62537). A timeout alone cannot tell that from a large shard.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.failures import Failure, is_unavailable

PATIENCE_SECONDS = 120.0  # without a heartbeat of any worker; a worker imports torch before its first one
_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 60.0


class Attendance:
    """Ray actor next to the driver, where memory is scarce: nothing here may import torch."""

    def __init__(self) -> None:
        self._signed = time.monotonic()
        self._failure: Failure | None = None

    def sign(self) -> None:
        """A worker is busy."""
        self._signed = time.monotonic()

    def fail(self, failure: Failure) -> None:
        """A worker failed; the run ends with the first failure."""
        self._failure = self._failure or failure

    def look(self) -> tuple[float, Failure | None]:
        """Seconds since the last heartbeat, and the first failure."""
        return time.monotonic() - self._signed, self._failure


def attendance() -> Any:
    """Handle of a new Attendance on the driver's own node, alive as long as the handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Attendance).remote()


@contextlib.contextmanager
def signing(book: Any, shard: str, every_s: float = PATIENCE_SECONDS / 10) -> Iterator[None]:
    """Sign while the block runs; report what it raises."""
    over = threading.Event()

    def sign() -> None:
        book.sign.remote()
        while not over.wait(every_s):
            book.sign.remote()

    threading.Thread(target=sign, daemon=True).start()
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RayError):
            ray.get(book.fail.remote(Failure.of(error, shard)), timeout=_ANSWER_SECONDS)
        raise
    finally:
        over.set()


class Silence(Exception):
    """Results are missing, and no worker has signed for a while or none can be reached."""


class Patience:
    """The driver's check of an Attendance, at most every few seconds."""

    def __init__(self, book: Any, seconds: float) -> None:
        self._book, self._seconds = book, seconds
        self._looked = time.monotonic()
        book.sign.remote()  # the silence is counted from now

    def check(self) -> None:
        """Raise the first failure of a worker, or Silence if none has signed for too long."""
        if time.monotonic() - self._looked < min(_LOOK_SECONDS, self._seconds / 4):
            return
        self._looked = time.monotonic()
        try:
            silence, failure = ray.get(self._book.look.remote(), timeout=_LOOK_SECONDS)
        except (GetTimeoutError, ActorUnavailableError):  # it is still starting, or the machine is overloaded
            return
        if failure is not None:
            raise failure.error()
        if silence > self._seconds:
            raise Silence(f"no worker has given a sign of life for {self._seconds:.0f} s")


@contextlib.contextmanager
def told_to(book: Any) -> Iterator[None]:
    """Prefer the failure that a worker has reported to what Ray makes of it, which is text.

    Raises Silence if a worker could not be reached: its tasks have to be submitted again.
    """
    try:
        yield
    except Silence:
        raise
    except Exception as error:
        failure = None
        with contextlib.suppress(RayError):
            _, failure = ray.get(book.look.remote(), timeout=_ANSWER_SECONDS)
        if failure is not None:
            raise failure.error() from error
        if is_unavailable(error):
            raise Silence("a worker could not be reached") from error
        raise
