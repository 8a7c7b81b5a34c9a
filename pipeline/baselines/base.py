"""What every baseline is: a function from labelled pictures to deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.baselines.trained.checkpoints import Checkpoints

Bound = Literal["linf", "l2", "none"]
NO_FIGURES: Mapping[str, float] = MappingProxyType({})  # of a method that fits nothing
Told = Callable[[float], None]  # is told the share of the work done, 0 to 1


@dataclass(frozen=True)
class LabelledPictures:
    """The pictures a baseline is fitted on, all of one size.

    images  uint8 [n, 3, S, S]
    labels  int64 [n], from 0: true, predicted, or clusters
    keys    of the samples; what is random about a sample is drawn from its key, not from its place
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        return int(self.labels.max()) + 1 if len(self.labels) else 0


@dataclass(frozen=True)
class BaselineSettings:
    """How a baseline is fitted.

    epsilon      bound on |delta|, pixel units; methods with a budget of their own say so in `bound`
    seed         of everything that is random
    device       "cpu" or "cuda"
    effort       1 is as published; less is a share of the published steps, which the figures then state
    checkpoints  from which a method that trains a network goes on; None: none are kept
    """

    epsilon: float
    seed: int = 0
    device: str = "cpu"
    effort: float = 1.0
    checkpoints: Checkpoints | None = None


class Baseline(Protocol):
    """A published protection."""

    @property
    def per_sample(self) -> bool:
        """True if every picture has a delta of its own, False if all of one label share theirs."""

    @property
    def bound(self) -> Bound:
        """What keeps delta small: epsilon, an L2 norm of the method's own, or nothing."""

    @property
    def source(self) -> str:
        """Paper, and the parts of it that this follows."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What the last fit came to, by name, e.g. the steps it took; for the protection's file."""

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """Whole 8-bit levels: int16 [n, 3, S, S] if `per_sample`, else [num_labels, 3, S, S]."""
