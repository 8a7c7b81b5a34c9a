"""What protections with a trained surrogate have in common: settings, order of the pictures, whole levels."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.baselines.base import BaselineSettings, Bound, LabelledPictures, Told
from pipeline.deltas.delta import quantise
from pipeline.errors import InputError
from pipeline.fitting.fit_figures import reproducible
from pipeline.hashing import derive
from pipeline.relearning.targets import check_target
from pipeline.relearning.training import Labelled

PUBLISHED_SURROGATE = "resnet18"  # `small` is the one for CPUs


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
