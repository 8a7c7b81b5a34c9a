"""Group class names by k-means on their concept embeddings, and score how well the groups separate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingsError
from pipeline.hashing import derive


def group_concepts(points: NDArray[np.float32], num_groups: int, *, seed: int) -> NDArray[np.int64]:
    """Group of each embedding [k, d] by k-means, int64 [k]; groups are numbered in order of first occurrence.

    The best of ten k-means++ starts. Raises SettingsError unless 2 <= num_groups < number of distinct embeddings.
    """
    from sklearn.cluster import KMeans  # imported here: it takes a second that most commands do not need

    different = len(np.unique(points, axis=0))
    if not 2 <= num_groups < different:
        raise SettingsError(f"{different} distinct concepts can form 2 to {different - 1} groups, not {num_groups}")
    kmeans = KMeans(num_groups, n_init=10, random_state=derive(seed, "concept groups", num_groups) % 2**32).fit(points)
    _, first, groups = np.unique(kmeans.labels_, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups].astype(np.int64)


def grouping_quality(points: NDArray[np.float32], groups: NDArray[np.int64]) -> dict[str, float]:
    """Scores of a grouping, Euclidean: the criteria Chen et al. 2024, section 4.6, use to choose the number of groups.

    sse                sum of squared distances to the group means
    silhouette         mean (b - a) / max(a, b)
    calinski_harabasz  ratio of between-group to within-group dispersion
    """
    from sklearn.metrics import calinski_harabasz_score, silhouette_score

    wide = points.astype(np.float64)
    sse = sum(((wide[groups == group] - wide[groups == group].mean(axis=0)) ** 2).sum() for group in np.unique(groups))
    return {
        "sse": float(sse),
        "silhouette": float(silhouette_score(wide, groups)),
        "calinski_harabasz": float(calinski_harabasz_score(wide, groups)),
    }
