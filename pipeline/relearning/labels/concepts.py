"""k-means of label names into classes by the embeddings of their concepts, and how well the classes are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingsError
from pipeline.fingerprint import derive


def group_concepts(points: NDArray[np.float32], num_groups: int, *, seed: int) -> NDArray[np.int64]:
    """k-means of embeddings [k, d] -> group of each, int64 [k]; groups are numbered as they first occur.

    The best of ten starts (k-means++). Raises SettingsError unless 2 <= num_groups < number of different embeddings.
    """
    from sklearn.cluster import KMeans  # here, for it takes a second that most commands do not need

    different = len(np.unique(points, axis=0))
    if not 2 <= num_groups < different:
        raise SettingsError(f"{different} different concepts make 2 to {different - 1} groups, not {num_groups}")
    found = KMeans(num_groups, n_init=10, random_state=derive(seed, "concept groups", num_groups) % 2**32).fit(points)
    _, first, groups = np.unique(found.labels_, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups].astype(np.int64)


def grouping_quality(points: NDArray[np.float32], groups: NDArray[np.int64]) -> dict[str, float]:
    """sse: sum of squared distances to the group's mean; silhouette: mean (b - a) / max(a, b); calinski_harabasz.

    The criteria by which Chen et al. 2024, section 4.6, choose the number of groups; euclidean.
    """
    from sklearn.metrics import calinski_harabasz_score, silhouette_score

    wide = points.astype(np.float64)
    sse = sum(((wide[groups == one] - wide[groups == one].mean(axis=0)) ** 2).sum() for one in np.unique(groups))
    return {
        "sse": float(sse),
        "silhouette": float(silhouette_score(wide, groups)),
        "calinski_harabasz": float(calinski_harabasz_score(wide, groups)),
    }
