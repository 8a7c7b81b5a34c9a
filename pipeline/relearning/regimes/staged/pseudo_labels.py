"""Labels from clusters of features, where the true ones do not follow the deltas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.hashing import derive


def pseudo_labels(features: NDArray[np.float32], num_classes: int, *, seed: int = 0) -> NDArray[np.int64]:
    """k-means clusters of features [n, d], int64 [n]: stand-in labels for deltas that follow clusters, not classes."""
    from sklearn.cluster import KMeans  # imported here: it takes a second that most commands do not need

    with threadpool_limits(1):  # for a fixed order of summation
        means = KMeans(num_classes, n_init=4, random_state=derive(seed, "acm-pseudo-labels") % 2**32)
        clusters: NDArray[np.int64] = means.fit_predict(features).astype(np.int64)
    return clusters
