"""From surrogate features to clusters: their space, centroids, assignment, quality and target clusters.

Shape letters: n rows, d surrogate feature, k dimension of the cluster space, p clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.clusters.kmeans import KMeansResult, Slices, assign_slice, best_start, cluster_sums, lloyd
from pipeline.clusters.smoothing import neighbours_for, smooth, unit_rows
from pipeline.errors import InputError, SettingsError
from pipeline.hashing import numpy_rng
from pipeline.json_record import JsonRecord
from pipeline.settings import FEWEST_CLUSTERS, Permutation
from pipeline.settings import ClusterSpace as SpaceName

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Head = tuple[Floats, Floats]  # weight [k, d] and bias [k] of the surrogate's classifier

_ROWS = 8192
_QUALITY_IMAGES = 2000
_QUALITY_NEIGHBOURS = 10


@dataclass(frozen=True)
class ClusterSpace:
    """The space in which k-means works: raw `features`, as in the paper, or `smoothed`.

    smoothed: class scores if the surrogate is a classifier, else features; minus their mean over the collection; scaled
    to unit length. The points that centroids are fitted on are then smoothed over their neighbours (see `smooth`).

    mean  float32 [k], or None for `features`
    head  the surrogate's classifier, or None
    """

    mean: Floats | None = None
    head: Head | None = None

    @classmethod
    def fit(cls, name: SpaceName, features: NDArray[Any], head: Head | None) -> ClusterSpace:
        """The space for a collection, centred on `features` [n, d]."""
        if name == "features":
            return cls()
        scores = _scores(features, head)
        return cls(scores.mean(axis=0, dtype=np.float64).astype(np.float32), head)

    @property
    def name(self) -> SpaceName:
        return "features" if self.mean is None else "smoothed"

    def points(self, features: NDArray[Any]) -> Floats:
        """Features float16 or float32 [n, d] -> points float32 [n, k], not smoothed."""
        if self.mean is None:
            return np.ascontiguousarray(features, dtype=np.float32)
        return unit_rows(_scores(features, self.head) - self.mean)

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays for `from_tensors`; empty for `features`."""
        tensors: dict[str, NDArray[Any]] = {}
        if self.mean is not None:
            tensors["space.mean"] = self.mean
        if self.head is not None:
            tensors |= {"space.weight": self.head[0], "space.bias": self.head[1]}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> ClusterSpace:
        """The inverse of `to_tensors`; other names are ignored."""
        weight, bias = tensors.get("space.weight"), tensors.get("space.bias")
        head = None if weight is None or bias is None else (weight, bias)
        return cls(tensors.get("space.mean"), head)


def _scores(features: NDArray[Any], head: Head | None) -> Floats:
    rows = np.asarray(features, dtype=np.float32)
    return rows if head is None else (rows @ head[0].T + head[1]).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Clustering:
    """The clusters of a collection: everything needed to assign any image to one of them.

    centroids      float32 [p, k], in `space`
    feature_means  float32 [p, d]: mean surrogate feature of each cluster, the target of deltas
    distance_p99   float32 [p]: 99 % of a cluster's fitted images are at most this far from its centroid; an image
                   well beyond it is unlike anything in the fitted collection
    """

    space: ClusterSpace
    centroids: Floats
    feature_means: Floats
    distance_p99: Floats

    def assign(self, features: NDArray[Any]) -> tuple[Ints, Floats]:
        """Nearest centroid, int32 [n], and Euclidean distance to it, float32 [n], of features [n, d]."""
        clusters, distances = np.empty(len(features), np.int32), np.empty(len(features), np.float32)
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            part = assign_slice(self.space.points(features[rows]), self.centroids)
            clusters[rows], distances[rows] = part.clusters, np.sqrt(part.distances)
        return clusters, distances

    def distances(self, features: NDArray[Any], clusters: Ints) -> Floats:
        """Euclidean distance, float32 [n], of features [n, d] to the centroids of the given clusters."""
        apart = self.space.points(features) - self.centroids[clusters]
        return np.asarray(np.linalg.norm(apart, axis=1), dtype=np.float32)

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays for a safetensors file."""
        names = ("centroids", "feature_means", "distance_p99")
        return {name: getattr(self, name) for name in names} | self.space.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Clustering:
        """The inverse of `to_tensors`; other names are ignored.

        Raises KeyError if one is missing, ValueError if shapes do not fit each other or a number is not finite.
        """
        space = ClusterSpace.from_tensors(tensors)
        made = cls(space, tensors["centroids"], tensors["feature_means"], tensors["distance_p99"])
        (p, k), (_, d) = made.centroids.shape, made.feature_means.shape
        shapes = {"feature_means": (p, d), "distance_p99": (p,)}
        if space.head is not None:
            shapes |= {"space.weight": (k, d), "space.bias": (k,)}
        elif k != d:
            raise ValueError(f"centroids of {k} dimensions in a space of {d}")
        if space.mean is not None:
            shapes["space.mean"] = (k,)
        for name in ("centroids", *shapes):
            if tensors[name].shape != shapes.get(name, (p, k)):
                raise ValueError(f"{name} of shape {tensors[name].shape}, not {shapes[name]}")
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"{name}: a number is not finite")
        return made


@dataclass(frozen=True)
class ClusterQuality:
    """How well the clusters are separated, judged without labels.

    silhouette           mean silhouette coefficient in [-1, 1] (Rousseeuw 1987) over at most 2,000 images; None if it
                         is not defined
    neighbour_agreement  share of an image's 10 nearest neighbours that are in its cluster, over at most 2,000 images
    """

    silhouette: float | None
    neighbour_agreement: float


@dataclass(frozen=True)
class ClusterReport(JsonRecord):
    """The cluster stage's results: printed, and shown in the report."""

    images: int  # number that centroids were fitted on
    sizes: tuple[int, ...]  # images per cluster
    inertia: float
    iterations: int
    reseeded: int  # empty clusters encountered
    restart_inertias: tuple[float, ...]  # ascending, on principal components
    quality: ClusterQuality


@dataclass(frozen=True)
class FittedClusters:
    """A clustering with the assignment of the images it was fitted on."""

    clustering: Clustering
    report: ClusterReport
    clusters: Ints  # [n]
    distances: Floats  # [n], Euclidean, of the point before smoothing


def fit_clusters(
    features: Sequence[NDArray[Any]],
    name: SpaceName,
    head: Head | None,
    num_clusters: int,
    *,
    restarts: int,
    seed: int,
    threads: int = 1,
) -> FittedClusters:
    """Cluster one collection that fits in memory.

    features  a float16 or float32 array [n_i, d] for each slice; empty slices are allowed
    Raises InputError if there are fewer distinct images than clusters. The result does not depend on `threads`.
    Source: Zhang et al. 2023, section 3.3; class scores and smoothing are ours.
    """
    rows = np.concatenate(list(features))
    check_enough(len(rows), num_clusters)
    with threadpool_limits(1):  # the number of threads may change BLAS's order of summation
        space = ClusterSpace.fit(name, rows, head)
        points = space.points(rows)
    fitted = points
    if name == "smoothed":
        fitted = smooth(points, neighbours_for(len(points), num_clusters), threads=threads)
    start = best_start(fitted, num_clusters, restarts=restarts, seed=seed, threads=threads)
    bounds = np.cumsum([len(part) for part in features])[:-1]
    result = lloyd(Slices(np.split(fitted, bounds), threads), start.centroids)
    sums = cluster_sums(rows, result.clusters, num_clusters)
    clustering = clustering_of(space, result, sums)
    distances = clustering.distances(rows, result.clusters)
    clustering = with_p99(clustering, result.clusters, distances)
    measured = quality(points, result.clusters, seed)
    return FittedClusters(clustering, report_on(result, start.inertias, measured), result.clusters, distances)


def clustering_of(space: ClusterSpace, result: KMeansResult, feature_sums: NDArray[np.float64]) -> Clustering:
    """A clustering from its centroids and the summed features [p, d] of each cluster; distance_p99 is still 0."""
    means = feature_sums / np.maximum(result.sizes, 1)[:, None]
    return Clustering(space, result.centroids, means.astype(np.float32), np.zeros(len(result.centroids), np.float32))


def with_p99(clustering: Clustering, clusters: Ints, distances: Floats) -> Clustering:
    """The same clustering with distance_p99 from the fitted images."""
    p99 = np.zeros(len(clustering.centroids), np.float32)
    for cluster in np.unique(clusters):
        p99[cluster] = np.percentile(distances[clusters == cluster], 99, method="higher")  # of few, the farthest
    return Clustering(clustering.space, clustering.centroids, clustering.feature_means, p99)


def report_on(result: KMeansResult, inertias: tuple[float, ...], measured: ClusterQuality) -> ClusterReport:
    """The report of one fit."""
    return ClusterReport(
        images=len(result.clusters),
        sizes=tuple(result.sizes.tolist()),
        inertia=result.inertia,
        iterations=result.iterations,
        reseeded=result.reseeded,
        restart_inertias=inertias,
        quality=measured,
    )


def check_enough(num_images: int, num_clusters: int) -> None:
    """Raise InputError if there are more clusters than images."""
    if num_images < FEWEST_CLUSTERS:
        what = f"clusters need at least {FEWEST_CLUSTERS} usable images; there are {num_images}"
        raise InputError(f"{what}: give a fitted --protection")
    if num_clusters > num_images:
        raise InputError(
            f"cannot form {num_clusters} clusters from {num_images} usable images; "
            f"lower --clusters to at most {num_images}"
        )


def quality(points: Floats, clusters: Ints, seed: int) -> ClusterQuality:
    """Quality of clusters, int32 [n], of points, float32 [n, k]."""
    rows = np.arange(len(points))
    if len(points) > _QUALITY_IMAGES:
        rows = np.sort(numpy_rng(seed, "cluster quality").choice(rows, _QUALITY_IMAGES, replace=False))
    labels = clusters[rows]
    defined = 2 <= len(np.unique(labels)) < len(labels)
    from sklearn.metrics import (
        silhouette_score,
    )  # imported here: it takes a second, and every worker imports this module

    silhouette = float(silhouette_score(points[rows], labels)) if defined else None
    wanted = min(_QUALITY_NEIGHBOURS, len(points) - 1)
    _, nearest = faiss.knn(points[rows], points, wanted + 1)
    others = nearest != rows[:, None]
    others[others.all(axis=1), -1] = False  # a duplicate may be found instead of the image itself
    agreeing = (clusters[nearest] == labels[:, None])[others]
    return ClusterQuality(silhouette, float(agreeing.mean()) if wanted else 1.0)


def target_clusters(centroids: NDArray[Any], permutation: Permutation) -> NDArray[np.int64]:
    """The target cluster of every cluster, int64 [p]: a permutation without fixed points.

    next  i -> (i + 1) mod p, as in Zhang et al. 2023, section 4.1
    far   maximises the sum of distances between centroids and their targets' (a linear assignment problem)
    centroids  [p, k], in the space where distances are measured
    Raises SettingsError for fewer than two clusters.
    """
    num_clusters = len(centroids)
    if num_clusters < 2:
        raise SettingsError("--clusters must be at least 2: images are moved to a cluster other than their own")
    if permutation == "next":
        return np.roll(np.arange(num_clusters), -1)
    from scipy.optimize import linear_sum_assignment  # imported here: every run imports this module

    wide = np.asarray(centroids, dtype=np.float64)
    apart = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    np.fill_diagonal(apart, -1e6 * (1 + apart.max()))
    return np.asarray(linear_sum_assignment(apart, maximize=True)[1], dtype=np.int64)
