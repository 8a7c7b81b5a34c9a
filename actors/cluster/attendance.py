"""Heartbeats: workers sign while they are busy, so that a slow one can be told from one that is gone.

Ray can lose a result for good, mostly when a node is cut off for a moment: a task or a message vanishes and nobody is
told (ray-project/ray issues 44357, 62535, 62537). A timeout alone cannot tell that from a large shard.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.failures import Failure, is_unavailable, ray_failures

PATIENCE_SECONDS = 120.0  # without a heartbeat of any worker; a worker imports torch before its first one
_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 60.0
_T = TypeVar("_T")
_actors: dict[str, Any] = {}  # of this driver, by its node and job


class Attendance:
    """Ray actor next to the driver, where memory is scarce: nothing here may import torch."""

    def __init__(self) -> None:
        self._signed: dict[str, float] = {}
        self._failures: dict[str, Failure] = {}

    def sign(self, stage: str) -> None:
        """A worker is busy."""
        self._signed[stage] = time.monotonic()

    def fail(self, stage: str, failure: Failure) -> None:
        """A worker failed; the run ends with the first failure."""
        self._failures.setdefault(stage, failure)

    def look(self, stage: str) -> tuple[float, Failure | None]:
        """Seconds since the last heartbeat, and the first failure."""
        now = time.monotonic()
        return now - self._signed.setdefault(stage, now), self._failures.get(stage)


@dataclass(frozen=True)
class Book:
    """Where the workers of one stage sign: an Attendance that all stages of a driver share, and a name of its own."""

    actor: Any
    stage: str

    def sign(self) -> None:
        self.actor.sign.remote(self.stage)

    def fail(self, failure: Failure, seconds: float) -> None:
        ray.get(self.actor.fail.remote(self.stage, failure), timeout=seconds)

    def look(self, seconds: float) -> tuple[float, Failure | None]:
        found: tuple[float, Failure | None] = ray.get(self.actor.look.remote(self.stage), timeout=seconds)
        return found


def attendance() -> Book:
    """A new book. The first starts the actor, on the driver's own node, for as long as the driver is connected."""
    about = ray.get_runtime_context()
    driver = f"{about.get_node_id()} {about.get_job_id()}"
    if driver not in _actors:
        _actors.clear()
        here = NodeAffinitySchedulingStrategy(about.get_node_id(), soft=True)
        _actors[driver] = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Attendance).remote()
    return Book(_actors[driver], uuid.uuid4().hex)


@contextlib.contextmanager
def signing(book: Book, shard: str, every_s: float = PATIENCE_SECONDS / 10) -> Iterator[None]:
    """Sign while the block runs; report what it raises."""
    over = threading.Event()

    def sign() -> None:
        book.sign()
        while not over.wait(every_s):
            book.sign()

    threading.Thread(target=sign, daemon=True).start()
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RayError):
            book.fail(Failure.of(error, shard), _ANSWER_SECONDS)
        raise
    finally:
        over.set()


class Silence(Exception):
    """Results are missing, and no worker has signed for a while or none can be reached."""


class Patience:
    """The driver's check of an Attendance, at most every few seconds."""

    def __init__(self, book: Book, seconds: float) -> None:
        self._book, self._seconds = book, seconds
        self._looked = time.monotonic()
        book.sign()  # the silence is counted from now

    def check(self) -> float:
        """Raise the first failure of a worker, or Silence if none has signed for too long.

        Returns the seconds since the last heartbeat; 0 if it is too soon to look again.
        """
        if time.monotonic() - self._looked < min(_LOOK_SECONDS, self._seconds / 4):
            return 0.0
        self._looked = time.monotonic()
        try:
            silence, failure = self._book.look(_LOOK_SECONDS)
        except (GetTimeoutError, ActorUnavailableError):  # it is still starting, or the machine is overloaded
            return 0.0
        if failure is not None:
            raise failure.error()
        if silence > self._seconds:
            raise Silence(f"no worker has given a sign of life for {self._seconds:.0f} s")
        return silence


@contextlib.contextmanager
def told_to(book: Book) -> Iterator[None]:
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
            _, failure = book.look(_ANSWER_SECONDS)
        if failure is not None:
            raise failure.error() from error
        if is_unavailable(error):
            raise Silence("a worker could not be reached") from error
        raise


def until_answered(left: Sized, what: str, ask: Callable[[Book, float, float], Iterator[_T]]) -> Iterator[_T]:
    """Ask until nothing is left, and yield what is answered; ask again, more patiently, for what is lost.

    left  shrinks as answers come; what names it
    ask   makes one attempt at all that is left; takes a Book, the patience and the time between heartbeats in seconds
    Raises the ScumbleError that a worker has reported, else ClusterError.
    """
    patience = PATIENCE_SECONDS
    with ray_failures():
        book = attendance()
        while left:
            before = len(left)
            try:
                with told_to(book):
                    yield from ask(book, patience, PATIENCE_SECONDS / 10)
            except Silence as silence:
                again = f"submitting the {len(left):,} remaining {what} again"
                print(f"warning: {silence}; {again}", file=sys.stderr, flush=True)
                # no machine may be free yet
                patience = 2 * patience if len(left) == before else PATIENCE_SECONDS
