"""Convolution-based unlearnable data (CUDA): all pictures of a label pass through one small random filter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import BaselineSettings, Bound, LabelledPictures, Told
from pipeline.hashing import numpy_rng

Floats = NDArray[np.floating[Any]]

SIDE = 3  # of a filter, pixels
_BLUR = 0.3  # the largest of all weights but one, which is 1
_BLOCK = 256  # pictures in float at a time


class ClassFilters:
    """A filter of 3 x 3 for each label: one weight, at a random place, is 1, the others are uniform up to 0.3.

    It is the same for all channels; what comes out is divided by its maximum. Nothing bounds the change.
    """

    per_sample = True  # a filter, so the delta depends on the picture
    bound: Bound = "none"
    source = "CUDA: Sadasivan et al., CVPR 2023, section 3, with k 3 and p 0.3; the places of the ones drawn, as there"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [n, 3, S, S]."""
        filters = np.stack([class_filter(settings.seed, label) for label in range(pictures.num_labels)])
        levels = np.empty(pictures.images.shape, np.int16)
        for start in range(0, len(levels), _BLOCK):
            block = slice(start, start + _BLOCK)
            before = pictures.images[block]
            passed = filtered(before / np.float32(255), filters[pictures.labels[block]])
            levels[block] = np.rint(255 * passed).astype(np.int16) - before
            told(min(1.0, (start + _BLOCK) / len(levels)))
        return levels


def class_filter(seed: int, label: int) -> Floats:
    """The filter of a label, [3, 3]."""
    rng = numpy_rng(seed, "class filter", label)
    weights = rng.uniform(0, _BLUR, SIDE * SIDE)
    weights[rng.integers(SIDE * SIDE)] = 1
    return weights.reshape(SIDE, SIDE).astype(np.float32)


def filtered(images: Floats, filters: Floats) -> Floats:
    """Pictures [n, 3, S, S] in [0, 1] after a filter each, [n, 3, 3], with zeros around them, at most 1."""
    side, edge = images.shape[-1], SIDE // 2
    around = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    passed = np.zeros_like(images)
    for y in range(SIDE):
        for x in range(SIDE):
            passed = passed + filters[:, y, x, None, None, None] * around[:, :, y : y + side, x : x + side]
    largest = passed.max((1, 2, 3), keepdims=True)
    scaled: Floats = passed / np.where(largest > 0, largest, np.float32(1))
    return scaled
