"""Where a fit that was stopped goes on: the loop it was in, the next step of that, and all that the step depends on."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import unreadable

SECONDS = 60.0  # between checkpoints, unless told otherwise


class Stateful(Protocol):
    """Something that the next step of a loop depends on."""

    def state(self) -> Mapping[str, Any]:
        """All of it, for torch.save."""

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""


class Checkpoints:
    """Keeps the state of a fit between the steps of its loops; by default it keeps nothing.

    kept     bytes of the last checkpoint, or None
    keep     takes the bytes of a new one
    where    the checkpoint is, for messages
    seconds  between two of them; None: a minute
    Raises InputError for a checkpoint that is damaged.
    """

    def __init__(
        self,
        kept: bytes | None = None,
        keep: Callable[[bytes], None] | None = None,
        *,
        where: str = "the checkpoint",
        seconds: float | None = None,
    ) -> None:
        self._kept: dict[str, Any] | None = None if kept is None else _loaded(kept, where)
        self._keep, self._seconds = keep, SECONDS if seconds is None else seconds
        self._finished: list[str] = []
        self._saved = time.monotonic()

    def steps(self, name: str, count: int, *parts: Stateful) -> Iterator[int]:
        """Numbers of the steps of a loop, from 0, or from where the checkpoint is, with `parts` as they were then.

        name   of the loop, unlike that of any other loop of the fit
        parts  all that later steps and later loops depend on
        Of a loop that the checkpoint has behind it no step is given, and its parts stay as they are: those of the later
        loop, in which the checkpoint is, must have them.
        """
        first = 0
        if self._kept is not None:
            if name in self._kept["finished"]:
                self._finished.append(name)
                return
            first = self._kept["next"]
            for part, state in zip(parts, self._kept["parts"], strict=True):
                part.load(state)
            self._kept = None
        for step in range(first, count):
            yield step
            self._maybe_keep(step + 1, parts)
        self._finished.append(name)

    def _maybe_keep(self, following: int, parts: tuple[Stateful, ...]) -> None:
        if self._keep is None or time.monotonic() - self._saved < self._seconds:
            return
        file = io.BytesIO()
        state = {"finished": self._finished, "next": following, "parts": [dict(part.state()) for part in parts]}
        torch.save(state, file)
        self._keep(file.getvalue())
        self._saved = time.monotonic()


def _loaded(data: bytes, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        return {name: found[name] for name in ("finished", "next", "parts")}
    except (RuntimeError, UnpicklingError, ValueError, KeyError, TypeError, EOFError) as error:
        raise unreadable(where, error, "delete it to begin the fit again") from None


class Tensors:
    """Tensors that steps change in place."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors

    def state(self) -> Mapping[str, Any]:
        return {str(number): tensor.detach().cpu() for number, tensor in enumerate(self._tensors)}

    def load(self, state: Mapping[str, Any]) -> None:
        for number, tensor in enumerate(self._tensors):
            tensor.copy_(state[str(number)])


class Weights:
    """Networks and optimisers, by their state dicts."""

    def __init__(self, *owners: nn.Module | torch.optim.Optimizer) -> None:
        self._owners = owners

    def state(self) -> Mapping[str, Any]:
        return {str(number): owner.state_dict() for number, owner in enumerate(self._owners)}

    def load(self, state: Mapping[str, Any]) -> None:
        for number, owner in enumerate(self._owners):
            owner.load_state_dict(state[str(number)])


class Figures:
    """Numbers by name that a loop goes on with."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def state(self) -> Mapping[str, Any]:
        return dict(self.values)

    def load(self, state: Mapping[str, Any]) -> None:
        self.values.update(state)
