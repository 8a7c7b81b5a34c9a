"""Convolution-based unlearnable data (CUDA): all pictures of a label pass through one small random filter."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, Bound, LabelledPictures, Told
from pipeline.hashing import numpy_rng

Floats = NDArray[np.floating[Any]]

# side of a filter in pixels, and the largest of all its weights but one, which is 1: as for CIFAR and for ImageNet-100
SMALL, LARGE = (3, 0.3), (9, 0.06)
_LARGE_FROM = 128  # pixels
_BLOCK = 256  # pictures in float at a time


class ClassFilters:
    """A filter for each label: one weight, at a random place, is 1, the others are uniform from 0.

    It is the same for all channels; what comes out is divided by its maximum, and truncated to 8 bits. Nothing bounds
    the change.
    """

    per_sample = True  # a filter, so the delta depends on the picture
    bound: Bound = "none"
    figures = NO_FIGURES
    source = "CUDA: Sadasivan et al., CVPR 2023, and their code: k 3, p 0.3; from 128 px k 9, p 0.06"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [n, 3, S, S]."""
        kind = LARGE if pictures.images.shape[-1] >= _LARGE_FROM else SMALL
        filters = np.stack([class_filter(settings.seed, label, *kind) for label in range(pictures.num_labels)])
        levels = np.empty(pictures.images.shape, np.int16)
        for start in range(0, len(levels), _BLOCK):
            block = slice(start, start + _BLOCK)
            before = pictures.images[block]
            passed = filtered(before / np.float32(255), filters[pictures.labels[block]])
            levels[block] = np.floor(255 * passed).astype(np.int16) - before
            told(min(1.0, (start + _BLOCK) / len(levels)))
        return levels


def class_filter(seed: int, label: int, side: int, blur: float) -> Floats:
    """The filter of a label, [side, side]."""
    rng = numpy_rng(seed, "class filter", label)
    weights = rng.uniform(0, blur, side * side)
    weights[rng.integers(side * side)] = 1
    return weights.reshape(side, side).astype(np.float32)


def filtered(images: Floats, filters: Floats) -> Floats:
    """Pictures [n, 3, S, S] in [0, 1] after a filter each, [n, k, k], with zeros around them, at most 1."""
    side, width = images.shape[-1], filters.shape[-1]
    edge = width // 2
    around = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    passed = np.zeros_like(images)
    for y, x in itertools.product(range(width), repeat=2):
        passed = passed + filters[:, y, x, None, None, None] * around[:, :, y : y + side, x : x + side]
    largest = passed.max((1, 2, 3), keepdims=True)
    scaled: Floats = passed / np.where(largest > 0, largest, np.float32(1))
    return scaled
