"""What protections with a trained surrogate have in common: settings, order of the pictures, whole levels."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Bound, LabelledPictures, Told
from pipeline.baselines.trained.surrogate import new_surrogate, plain_recipe, seconds_each, sgd_step
from pipeline.deltas.delta import quantise
from pipeline.errors import InputError
from pipeline.fitting.fit_figures import reproducible
from pipeline.hashing import derive
from pipeline.relearning.targets import check_target
from pipeline.relearning.training import Labelled

PUBLISHED_SURROGATE = "resnet18"  # `small` is the one for CPUs
LEAST_TIMED, TIMED_PIXELS = 8, 1 << 17  # pictures on which a pass is timed, at least, and about how large together


class FittedBaseline(ABC):
    """A baseline whose deltas are fitted with networks that are trained on the pictures.

    figures  what the last fit came to, by name, e.g. how often deltas were updated

    Pictures are taken in the order of their hashed keys, so the deltas depend on the keys and not on the order in which
    pictures come. In memory: deltas as n x 3 x S x S floats, the pictures as bytes a few times, and one batch.
    """

    per_sample: bool = True
    bound: Bound = "linf"
    source: str

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """Whole levels within epsilon; sample-wise ones also keep picture + delta within 0 … 255.

        Raises InputError for fewer than two labels, PromiseError for a training that diverges.
        """
        if len(np.unique(pictures.labels)) < 2:
            raise InputError("all pictures have the same label: there is nothing to train a surrogate on")
        hashes = [derive(settings.seed, "baseline-order", key) for key in pictures.keys]
        order = np.argsort(np.array(hashes), kind="stable")
        images = pictures.images[order]
        ordered = Labelled(torch.from_numpy(images), torch.from_numpy(pictures.labels[order]))
        self.figures = {}
        with reproducible():
            levels = quantise(self.fit(ordered, settings, told), settings.epsilon).astype(np.int16)
        told(1.0)
        if not self.per_sample:
            return levels
        signed = images.astype(np.int16)
        placed = np.empty_like(levels)
        placed[order] = np.clip(levels, -signed, 255 - signed)
        return placed

    @abstractmethod
    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        """Deltas, float32 in [0, 1] pixel units: [n, 3, S, S] if `per_sample`, else [num_labels, 3, S, S]."""


class SurrogateBaseline(FittedBaseline):
    """A baseline that trains a surrogate.

    surrogate  the network: a name in pipeline.relearning.targets. Raises SettingsError for others
    """

    def __init__(self, surrogate: str = PUBLISHED_SURROGATE) -> None:
        super().__init__()
        check_target(surrogate)
        self.surrogate = surrogate

    @abstractmethod
    def passes(self, images: int, effort: float) -> float:
        """The most passes that a fit on so many pictures takes: of one picture through the surrogate, and back.

        A pass without a way back counts a third.
        """

    def most_seconds(self, images: int, side: int, settings: BaselineSettings) -> float:
        """About how long a fit on so many pictures of that side may take on this machine's processor."""
        count = min(images, max(LEAST_TIMED, TIMED_PIXELS // side**2))
        some = Labelled(torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.arange(count) % 2)
        return self.passes(images, settings.effort) * self.seconds_of_pass(some, settings)

    def seconds_of_pass(self, some: Labelled, settings: BaselineSettings) -> float:
        """Seconds that a pass takes, measured on some pictures."""
        surrogate = new_surrogate(self.surrogate, some, settings, plain_recipe(1))
        surrogate.network.train()
        images = surrogate.images.float() / 255
        return seconds_each(
            len(images),
            lambda: sgd_step(surrogate, F.cross_entropy(surrogate.scores(images), surrogate.labels), rate=0.0),
        )
