"""Synthetic perturbations (SP, also called LSP): a linearly separable pattern of large patches for each picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, Bound, LabelledPictures, Told
from pipeline.baselines.shortcuts.class_noise import spread
from pipeline.hashing import derive

LEVELS = 6  # root mean square of a delta in 8-bit levels, before it is truncated
_APART = 10.0  # `class_sep`
_LARGEST_PATCH = 32


class Separable:
    """Points of scikit-learn's `make_classification`, one for each picture, as patterns of patches.

    The norm is bounded, not each pixel: some move further than 16 levels.
    """

    per_sample = True
    bound: Bound = "l2"
    figures = NO_FIGURES
    source = "synthetic perturbations: Yu et al., KDD 2022, section 4; truncated to 8 bits as in their code"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [n, 3, S, S]."""
        patterns = separable_patterns(pictures, settings.seed)
        side = pictures.images.shape[-1]
        levels = np.empty((len(patterns), 3, side, side), np.int16)
        for row, pattern in enumerate(patterns):  # one at a time, because the floats take four times the memory
            levels[row] = np.floor(spread(pattern, patch_of(side), side))
        return levels


def patch_of(side: int) -> int:
    """Pixels over which a pattern is constant: 8 at 32 px as published, 32 at 224 px as APBench has it."""
    return max(1, min(_LARGEST_PATCH, side // 4))


def separable_patterns(pictures: LabelledPictures, seed: int) -> NDArray[np.float64]:
    """A pattern [3, k, k] for each picture; laid over the picture its L2 norm is sqrt(3 S S) * 6 levels.

    Within a label, pictures get their points in the order of their keys.
    """
    from sklearn.datasets import make_classification  # imported here: it takes a second

    side, num_labels = pictures.images.shape[-1], pictures.num_labels
    cells = -(-side // patch_of(side))
    counts = np.bincount(pictures.labels)
    points, of = make_classification(
        n_samples=len(pictures.keys),
        weights=(counts + 0.5) / len(pictures.keys),  # the library rounds down
        n_features=3 * cells * cells,
        n_informative=3 * cells * cells,
        n_redundant=0,
        n_classes=num_labels,
        n_clusters_per_class=1,
        class_sep=_APART,
        flip_y=0.0,
        shuffle=False,
        random_state=derive(seed, "separable") % 2**32,
    )
    patterns = np.empty((len(pictures.keys), 3, cells, cells))
    ordered = np.array(sorted(range(len(pictures.keys)), key=pictures.keys.__getitem__))
    for label in range(num_labels):
        rows = ordered[pictures.labels[ordered] == label]
        patterns[rows] = points[of == label].reshape(-1, 3, cells, cells)
    # the last patches may be cut off, so the norm is that of what is laid
    width = np.minimum(patch_of(side), side - patch_of(side) * np.arange(cells))
    energy = (patterns**2 * np.outer(width, width)).sum((1, 2, 3), keepdims=True)
    scaled: NDArray[np.float64] = patterns / np.sqrt(energy) * (math.sqrt(3) * side * LEVELS)
    return scaled
