"""How much the clusters of a protection tell about the labels that a target is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Overlap:
    """Clusters c against labels y of N images, with n(c, y) images in both.

    shortcut_accuracy    sum over c of max over y of n(c, y) / N: what a classifier that sees only the cluster can reach
    ami                  adjusted mutual information (Vinh et al. 2010), normalised by the mean entropy; 0 is chance
    """

    shortcut_accuracy: float
    ami: float

    @property
    def purity(self) -> float:
        """Purity of the clusters, which is the shortcut accuracy by another name."""
        return self.shortcut_accuracy


def overlap(clusters: ArrayLike, labels: ArrayLike) -> Overlap:
    """The overlap of two partitions, integers [n] each. Raises ValueError for empty or unequal lengths."""
    from sklearn.metrics import adjusted_mutual_info_score  # here, for it takes a second that most commands do not need

    counts = joint_counts(clusters, labels)
    total = counts.sum()
    return Overlap(
        shortcut_accuracy=float(counts.max(axis=1).sum() / total),
        ami=float(adjusted_mutual_info_score(np.asarray(labels), np.asarray(clusters))),
    )


def joint_counts(clusters: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """n(c, y), int64 [number of clusters, number of labels that occur]; ascending. Raises ValueError as `overlap`."""
    rows, columns = np.asarray(clusters), np.asarray(labels)
    if rows.shape != columns.shape or rows.ndim != 1 or not len(rows):
        raise ValueError(f"clusters {rows.shape} and labels {columns.shape} must be one per image, for some images")
    _, rows = np.unique(rows, return_inverse=True)
    _, columns = np.unique(columns, return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def conditional_entropy(counts: NDArray[np.int64]) -> float:
    """H(Y|C) in bits of n(c, y) [clusters, labels]; of a single row it is H(Y)."""
    sizes = counts.sum(axis=1, keepdims=True)
    present = counts > 0
    shares = counts[present] / np.broadcast_to(sizes, counts.shape)[present]
    return abs(float(-(counts[present] * np.log2(shares)).sum() / counts.sum()))
