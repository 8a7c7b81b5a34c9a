"""Protections that are known to work on someone who trains the ordinary way, and that need the labels: the controls.

If a target learns in spite of these, the evaluation is broken, not the protection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import make_classification

PATCH = 8  # pixels over which a separable pattern is constant
SEPARABLE_LEVELS = 6  # root mean square of a separable delta, in 8-bit levels (Yu et al. 2022, section 4.1)


def class_wise_random(labels: NDArray[np.int64], side: int, *, levels: int = 16, seed: int = 0) -> NDArray[np.int16]:
    """Deltas int16 [n, 3, side, side]: one per class, every pixel uniform in -levels ... levels (Huang et al. 2021)."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-levels, levels + 1, (int(labels.max()) + 1, 3, side, side)).astype(np.int16)
    return noise[labels]


def class_wise_blocks(labels: NDArray[np.int64], side: int, *, levels: int = 16, seed: int = 0) -> NDArray[np.int16]:
    """Deltas int16 [n, 3, side, side]: one per class, signs that are constant over blocks of 8 x 8 pixels."""
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    signs = rng.choice(np.array([-levels, levels], np.int16), (classes, 3, -(-side // PATCH), -(-side // PATCH)))
    return _spread(signs, side)[labels]


def separable(labels: NDArray[np.int64], side: int, *, seed: int = 0) -> NDArray[np.int16]:
    """Synthetic perturbations (SP), int16 [n, 3, side, side]: one per image, linearly separable by class.

    A point of scikit-learn's make_classification, one cluster per class, class_sep 10, all features informative, is a
    pattern of patches of 8 x 8 pixels; its L2 norm is sqrt(3 * side * side) * 6 levels. Some pixels move further than
    16 levels: SP bounds the norm, not each pixel. Yu et al. 2022, "Availability Attacks Create Shortcuts", section 4.
    """
    cells, classes = -(-side // PATCH), int(labels.max()) + 1
    per_class = int(np.bincount(labels).max())
    points, of = make_classification(
        n_samples=classes * per_class,
        n_features=3 * cells * cells,
        n_informative=3 * cells * cells,
        n_redundant=0,
        n_classes=classes,
        n_clusters_per_class=1,
        class_sep=10.0,
        flip_y=0.0,
        shuffle=False,
        random_state=seed,
    )
    found = np.zeros((len(labels), 3, side, side), np.int16)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        patterns = points[np.flatnonzero(of == label)[: len(rows)]].reshape(len(rows), 3, cells, cells)
        deltas = _spread(patterns, side)
        norm = np.sqrt((deltas**2).sum((1, 2, 3), keepdims=True))
        found[rows] = np.rint(deltas / norm * np.sqrt(3.0) * side * SEPARABLE_LEVELS)
    return found


def carrying_each(images: NDArray[np.uint8], deltas: NDArray[np.int16]) -> NDArray[np.uint8]:
    """uint8 [n, 3, S, S] images with a delta each, clipped to 0 ... 255."""
    return (images.astype(np.int16) + deltas).clip(0, 255).astype(np.uint8)


def _spread(patterns: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    return patterns.repeat(PATCH, 2).repeat(PATCH, 3)[:, :, :side, :side]
