"""How much a protection's clusters reveal about the labels that a target is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Overlap:
    """Clusters c against labels y of N images, with n(c, y) images in both.

    shortcut_accuracy    sum over c of max over y of n(c, y) / N: the best accuracy possible from the cluster alone
    ami                  adjusted mutual information (Vinh et al. 2010), normalised by the mean entropy; 0 is chance
    """

    shortcut_accuracy: float
    ami: float

    @property
    def purity(self) -> float:
        """Cluster purity: another name for the shortcut accuracy."""
        return self.shortcut_accuracy


def overlap(clusters: ArrayLike, labels: ArrayLike) -> Overlap:
    """The overlap of two partitions, integers [n] each. Raises ValueError if they are empty or differ in length."""
    from sklearn.metrics import adjusted_mutual_info_score  # imported here: it takes a second

    counts = joint_counts(clusters, labels)
    total = counts.sum()
    return Overlap(
        shortcut_accuracy=float(counts.max(axis=1).sum() / total),
        ami=float(adjusted_mutual_info_score(np.asarray(labels), np.asarray(clusters))),
    )


def joint_counts(clusters: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """n(c, y), int64 [clusters, labels], ascending, only those that occur. Raises ValueError like `overlap`."""
    rows, columns = np.asarray(clusters), np.asarray(labels)
    if rows.shape != columns.shape or rows.ndim != 1 or not len(rows):
        raise ValueError(f"clusters {rows.shape} and labels {columns.shape} must be equally long and not empty")
    _, rows = np.unique(rows, return_inverse=True)
    _, columns = np.unique(columns, return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def conditional_entropy(counts: NDArray[np.int64]) -> float:
    """H(Y|C) in bits from counts n(c, y) [clusters, labels]; for a single row, H(Y)."""
    sizes = counts.sum(axis=1, keepdims=True)
    present = counts > 0
    shares = counts[present] / np.broadcast_to(sizes, counts.shape)[present]
    return abs(float(-(counts[present] * np.log2(shares)).sum() / counts.sum()))
