"""The objective of Unlearnable Clusters: how far features are from the wrong centroid, and steps against it.

Zhang et al. 2023, section 3.3: delta_i drags the images of cluster i to the centroid of another cluster,
g(mu_i), in the feature space of a frozen network; the distance d is left open there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.settings import Distance, Settings

PROXY_SIDES = (32, 72)  # deltas of this size survive resizing, and a proxy learns quickly at it


def distances(features: Tensor, aims: Tensor, distance: Distance) -> Tensor:
    """Distance of each feature to its aim -> [B].

    features, aims  float [B, d]
    kl      KL(softmax aim || softmax feature), temperature 1: what the authors' code computes
    cosine  1 - cosine similarity
    l2      squared Euclidean distance: the geometry of k-means
    """
    if distance == "kl":
        log_features, log_aims = F.log_softmax(features, 1), F.log_softmax(aims, 1)
        return (log_aims.exp() * (log_aims - log_features)).sum(1)
    if distance == "cosine":
        return 1 - F.cosine_similarity(features, aims, dim=1)
    return (features - aims).square().sum(1)


def sum_by_cluster(values: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Sums of values [B, ...] over the images of each cluster -> [p, ...], in a fixed order on every device."""
    members = F.one_hot(clusters, num_clusters).to(values.dtype)
    return (members.T @ values.reshape(len(values), -1)).reshape(num_clusters, *values.shape[1:])


def feature_means(features: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Mean feature of each cluster, float32 [p, d], summed in float64; clusters without images get zeros."""
    sums = sum_by_cluster(features.double(), clusters, num_clusters)
    counts = torch.bincount(clusters, minlength=num_clusters).clamp_min(1)
    return (sums / counts[:, None]).float()


def is_moved(features: Tensor, centroids: Tensor, aims: Tensor) -> Tensor:
    """bool [n]: is the nearest centroid (Euclidean) of each feature the one it was meant to move to?

    features [n, d]; centroids [p, d]; aims int64 [n] in 0 ... p-1
    """
    return torch.cdist(features.float(), centroids.float()).argmin(1) == aims


def delta_side(settings: Settings, surrogate_input_size: int, shorter_sides: Sequence[int]) -> int:
    """Side in pixels at which deltas are made.

    shorter_sides  of the images that deltas are fitted on, not empty
    --delta-size where given; through the surrogate its input size (224 with --size 224); through the proxy the
    median shorter side, rounded down to a multiple of 8, between 32 and 72.
    """
    if settings.delta_size is not None:
        return settings.delta_size
    if settings.optimise_through == "surrogate":
        side = 224 if settings.size == "224" else surrogate_input_size
        return side // 4 * 4 if settings.generator == "network" else side
    median = sorted(shorter_sides)[len(shorter_sides) // 2]
    return max(PROXY_SIDES[0], min(PROXY_SIDES[1], median // 8 * 8))
