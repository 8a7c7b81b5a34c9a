"""Turn a finished training into a protection: weights, training figures, and clusters of the training images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.clusters.clustering import Clustering, fit_clusters
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.hashing import numpy_rng
from pipeline.one_for_all.training import UniversalFit
from pipeline.surrogates.concepts import ConceptBank

EMBEDDED_IMAGES = 5_000  # training images embedded for the centroids that drift is measured against
PER_CLUSTER, MOST_CLUSTERS = 50, 20
CURVE_POINTS = 200
_BATCH = 64
_LICENCE = (
    "trained on the images and with the surrogate named here: the terms of both apply to this file; "
    "the weights of the surrogate are not in it"
)


def finished_protection(fit: UniversalFit, bank: ConceptBank, fingerprint: str) -> UniversalProtection:
    """The protection from a finished training."""
    settings = fit.settings
    weights = {
        name: value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
        for name, value in fit.generator.state_dict().items()
    }
    return UniversalProtection(
        surrogate_id=fit.surrogate.id,
        epsilon=settings.epsilon,
        bound=settings.bound,
        side=fit.side,
        width=settings.width,
        blocks=settings.blocks,
        weights=weights,
        clustering=_clustering(fit),
        fingerprint=fingerprint,
        licence=_LICENCE,
        figures={
            "steps": fit.step,
            "images": len(fit.images.pixels),
            "batch_size": settings.batch_size,
            "loss": settings.loss,
            "select_by": settings.select_by,
            "near": settings.near,
            "concepts": len(bank.names),
            "curves": {name: _curve(values) for name, values in fit.curves.items()},
        },
    )


def _clustering(fit: UniversalFit) -> Clustering:
    """k-means on a sample of the training images, embedded the way new pictures will be."""
    pixels = fit.images.pixels
    rows = np.sort(
        numpy_rng(fit.settings.seed, "14a-centroids").permutation(len(pixels))[: min(len(pixels), EMBEDDED_IMAGES)]
    )
    pictures = [pixels[row].permute(1, 2, 0).numpy() for row in rows.tolist()]
    features = np.concatenate(
        [fit.surrogate.embed_pictures(pictures[at : at + _BATCH]) for at in range(0, len(pictures), _BATCH)]
    )
    distinct = len(np.unique(features, axis=0))  # after days of training, copies of one picture must not end the run
    num_clusters = max(1, min(MOST_CLUSTERS, len(features) // PER_CLUSTER, distinct))
    fitted = fit_clusters([features], "features", None, num_clusters, restarts=4, seed=fit.settings.seed)
    return fitted.clustering


def _curve(values: list[float]) -> list[float]:
    """At most 200 points, each the mean of an equal stretch."""
    parts: list[NDArray[Any]] = np.array_split(np.array(values), min(CURVE_POINTS, len(values)))
    return [round(float(part.mean()), 6) for part in parts]


def bank_tensor(bank: ConceptBank) -> torch.Tensor:
    """The bank's embeddings, float32 [m, d]."""
    return torch.from_numpy(np.array(bank.embeddings))
