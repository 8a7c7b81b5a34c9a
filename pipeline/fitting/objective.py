"""The objective of Unlearnable Clusters: the distance of features from the wrong cluster's centroid.

Zhang et al. 2023, section 3.3: delta_i moves the images of cluster i to the centroid of another cluster, g(mu_i), in
the feature space of a frozen network. The paper leaves the distance d open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.settings import Distance, Settings

PROXY_SIDES = (32, 72)  # deltas of this size survive resizing, and proxies learn quickly


def distances(features: Tensor, aims: Tensor, distance: Distance) -> Tensor:
    """Distance of each feature from its target, [B].

    features  float [B, d]
    aims      float [B, d], the target of each feature
    distance  kl      KL(softmax aim || softmax feature), temperature 1, as in the authors' code
              cosine  1 - cosine similarity
              l2      squared Euclidean distance, as in k-means
    """
    if distance == "kl":
        log_features, log_aims = F.log_softmax(features, 1), F.log_softmax(aims, 1)
        return (log_aims.exp() * (log_aims - log_features)).sum(1)
    if distance == "cosine":
        return 1 - F.cosine_similarity(features, aims, dim=1)
    return (features - aims).square().sum(1)


def sum_by_cluster(values: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Sum of values [B, ...] over each cluster's images, [p, ...], in a fixed order on every device."""
    members = F.one_hot(clusters, num_clusters).to(values.dtype)
    return (members.T @ values.reshape(len(values), -1)).reshape(num_clusters, *values.shape[1:])


def feature_means(features: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Mean feature of each cluster, float32 [p, d], summed in float64; clusters without images get zeros."""
    sums = sum_by_cluster(features.double(), clusters, num_clusters)
    counts = torch.bincount(clusters, minlength=num_clusters).clamp_min(1)
    return (sums / counts[:, None]).float()


def is_moved(features: Tensor, centroids: Tensor, aims: Tensor) -> Tensor:
    """Whether the nearest centroid (Euclidean) of each feature is its target's, bool [n].

    features   [n, d]
    centroids  [p, d]
    aims       int64 [n], target clusters in 0 ... p-1
    """
    return torch.cdist(features.float(), centroids.float()).argmin(1) == aims


def delta_side(settings: Settings, surrogate_input_size: int, shorter_sides: Sequence[int]) -> int:
    """Side of deltas in pixels.

    shorter_sides  of the images that deltas are fitted on, not empty
    This is --delta-size if given. Through the surrogate: its input size (224 with --size 224). Through the proxy: the
    median shorter side, rounded down to a multiple of 8, between 32 and 72.
    """
    if settings.delta_size is not None:
        return settings.delta_size
    if settings.optimise_through == "surrogate":
        side = 224 if settings.size == "224" else surrogate_input_size
        return side // 4 * 4 if settings.generator == "network" else side
    median = sorted(shorter_sides)[len(shorter_sides) // 2]
    return max(PROXY_SIDES[0], min(PROXY_SIDES[1], median // 8 * 8))
