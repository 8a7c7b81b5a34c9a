"""Failures as data: an actor reports kind, message and shard, and the driver raises the matching exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from pipeline import errors
from pipeline.errors import ClusterError, ScumbleError, one_line

_INSIDE = ("cause", "__cause__", "__context__", "controller_failure", "_base_exc")  # where Ray keeps what it wraps


@dataclass(frozen=True)
class Failure:
    """What a worker reports of an exception: the name of its class, its text, and the shard it was processing."""

    kind: str
    message: str
    shard: str

    @classmethod
    def of(cls, error: BaseException, shard: str) -> Failure:
        return cls(type(error).__name__, str(error), shard)

    def error(self) -> ScumbleError:
        """The ScumbleError that it was; anything else is a ClusterError that names its type."""
        message = one_line(self.message, 500)
        where = f"{self.shard}: " if self.shard and self.shard not in message else ""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ScumbleError):
            return kind(where + message)
        return _broken(f"{where}{self.kind}: {message}")


@contextlib.contextmanager
def ray_failures() -> Iterator[None]:
    """Raise the ScumbleError that Ray has wrapped; anything else that Ray raises becomes a one-line ClusterError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ScumbleError) and not isinstance(error, RayError):
            raise
        if (ours := ours_in(error)) is not None:
            raise ours from error
        if not isinstance(error, RayError) and not type(error).__module__.startswith("ray."):
            raise
        raise _cluster_error(error) from error


def _cluster_error(error: Exception) -> ClusterError:
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__).strip()
    if isinstance(error, RayActorError | OutOfMemoryError):
        return ClusterError(
            f"a worker process died too often ({line.partition('. ')[0].rstrip('.')[:120]}), most often for lack of "
            "memory: give it more, or use fewer --workers, then run the same command again"
        )
    return _broken(f"{type(error).__name__}: {line[:300]}")


def _broken(what: str) -> ClusterError:
    return ClusterError(f"a worker failed: {what}; run the same command again, or add --debug")


def ours_in(error: BaseException) -> ScumbleError | None:
    """The first ScumbleError among the exceptions that one wraps."""
    ours = (wrapped for wrapped in _wrapped_in(error) if isinstance(wrapped, ScumbleError))
    return next(
        (wrapped for wrapped in ours if not isinstance(wrapped, RayError)), None
    )  # the copy that Ray makes has a traceback as its text


def is_unavailable(error: BaseException) -> bool:
    """True if Ray could not reach an actor for a moment: it may be alive, and may have done its task."""
    return any(isinstance(wrapped, ActorUnavailableError) for wrapped in _wrapped_in(error))


def _wrapped_in(error: BaseException) -> Iterator[BaseException]:
    """An exception, and whatever it wraps, nearest first."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        candidate = waiting.pop(0)
        if isinstance(candidate, BaseException) and id(candidate) not in seen:
            seen.add(id(candidate))
            yield candidate
            waiting += [getattr(candidate, name, None) for name in _INSIDE]
            waiting += getattr(candidate, "worker_failures", {}).values()
