"""Activations in two dimensions, for plotting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PERPLEXITY = 30


def project(features: NDArray[np.float32], *, seed: int) -> dict[str, Any]:
    """{pca: [[x, y], …], tsne: …} of features [n, d], rounded; tsne is empty for fewer than 10 rows."""
    from sklearn.decomposition import PCA  # imported here: it takes a second that most commands do not need
    from sklearn.manifold import TSNE

    usable = np.nan_to_num(features)
    pca = PCA(2, svd_solver="full").fit_transform(usable) if len(usable) > 2 else np.zeros((len(usable), 2))
    maps = {"pca": np.round(pca, 4).tolist(), "tsne": []}
    if len(usable) >= 10 and usable.std() > 0:
        perplexity = min(PERPLEXITY, (len(usable) - 1) / 3)
        mapped = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(usable)
        maps["tsne"] = np.round(mapped, 3).tolist()
    return maps
