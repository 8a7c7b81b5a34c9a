"""K-means whose centroids do not depend on how the points are distributed.

The points stay in fixed slices behind the protocol of `faiss.contrib.clustering` (count, dim, get_subset, assign_to).
Each slice returns float64 sums, which are added in slice order, so that one process and any number of workers find
bit-identical centroids. Shape letters: n rows, k dimension, p clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.errors import InputError
from pipeline.hashing import derive, numpy_rng

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

MAX_ITERATIONS = 300
TOLERANCE = 1e-5  # relative decrease in inertia
RESTART_DIMENSIONS = 64
RESTART_IMAGES = 20_000
_ROWS = 512  # rows widened to float64 at a time: small enough to stay in the cache


class PointSet(Protocol):
    """The points to cluster, wherever they are: the protocol of faiss.contrib.clustering.DatasetAssign."""

    def count(self) -> int: ...

    def dim(self) -> int: ...

    def get_subset(self, indices: NDArray[Any]) -> Floats:
        """The rows at `indices`, [m, k]."""

    def assign_to(self, centroids: NDArray[Any], weights: None = None) -> tuple[Ints, Floats, NDArray[np.float64]]:
        """Nearest centroid, int32 [n]; squared distance, float32 [n]; sum of points per centroid, float64 [p, k]."""


@dataclass(frozen=True)
class Part:
    """One slice's assignment to a set of centroids."""

    clusters: Ints  # [n]
    distances: Floats  # [n], squared
    sums: NDArray[np.float64]  # [p, k]


def assign_slice(points: Floats, centroids: Floats) -> Part:
    """Assign each row of a slice to its nearest centroid, on one thread, so that the result is deterministic.

    points     float32 [n, k]
    centroids  float32 [p, k]
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        distances, clusters = faiss.knn(points, centroids, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    nearest = clusters.ravel().astype(np.int32)
    return Part(nearest, distances.ravel(), cluster_sums(points, nearest, len(centroids)))


def cluster_sums(points: NDArray[Any], clusters: Ints, num_clusters: int) -> NDArray[np.float64]:
    """Sum of each cluster's rows, float64 [p, k], added in row order."""
    sums = np.zeros((num_clusters, points.shape[1]))
    for start in range(0, len(points), _ROWS):
        block = points[start : start + _ROWS].astype(np.float64)
        rows = len(block)
        members = scipy.sparse.csc_matrix(
            (np.ones(rows), clusters[start : start + rows], np.arange(rows + 1)), shape=(num_clusters, rows)
        )
        sums += members @ block
    return sums


def joined(parts: Sequence[Part]) -> tuple[Ints, Floats, NDArray[np.float64]]:
    """Combine the results of all slices, summing in the given order."""
    sums = np.zeros_like(parts[0].sums)
    for part in parts:
        sums += part.sums
    clusters = np.concatenate([part.clusters for part in parts])
    return clusters, np.concatenate([part.distances for part in parts]), sums


class Slices:
    """Points in this process: a list of slices, processed by `threads` threads, one slice each."""

    def __init__(self, slices: Sequence[NDArray[Any]], threads: int = 1) -> None:
        self.slices = [np.ascontiguousarray(part, dtype=np.float32) for part in slices if len(part)]
        if not self.slices:
            raise InputError("nothing to cluster: no image could be embedded (--dry-run says why)")
        self.threads = threads

    @classmethod
    def of(cls, points: NDArray[Any], rows: int = 16_384, threads: int = 1) -> Slices:
        """Split points into slices of a fixed number of rows."""
        return cls([points[start : start + rows] for start in range(0, len(points), rows)], threads)

    def count(self) -> int:
        return sum(len(part) for part in self.slices)

    def dim(self) -> int:
        return int(self.slices[0].shape[1])

    def get_subset(self, indices: NDArray[Any]) -> Floats:
        starts = np.cumsum([0, *(len(part) for part in self.slices)])
        slice_of = np.searchsorted(starts, indices, side="right") - 1
        rows = [self.slices[s][i - starts[s]] for s, i in zip(slice_of, indices, strict=True)]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.dim())

    def assign_to(self, centroids: NDArray[Any], weights: None = None) -> tuple[Ints, Floats, NDArray[np.float64]]:
        wanted = np.ascontiguousarray(centroids, dtype=np.float32)
        if self.threads == 1:
            return joined([assign_slice(part, wanted) for part in self.slices])
        with ThreadPoolExecutor(self.threads) as pool:
            return joined(list(pool.map(lambda part: assign_slice(part, wanted), self.slices)))


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and the matching assignment."""

    centroids: Floats  # [p, k]
    clusters: Ints  # [n]
    distances: Floats  # [n], squared
    inertia: float  # sum of the squared distances
    iterations: int  # passes over the points
    reseeded: int  # empty clusters that were given a new centroid

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.clusters, minlength=len(self.centroids)).astype(np.int64)


def lloyd(
    points: PointSet, start: Floats, *, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE
) -> KMeansResult:
    """Lloyd's algorithm from `start`, float32 [p, k], until the relative decrease in inertia is at most `tolerance`.

    The returned assignment and inertia match the returned centroids. An empty cluster is reseeded with the point
    farthest from its centroid, as in scikit-learn.
    """
    centroids = np.ascontiguousarray(start, dtype=np.float32)
    before, reseeded, passes = 0.0, 0, 0  # before = 0: nothing to compare to
    while True:
        clusters, distances, sums = points.assign_to(centroids)
        inertia, passes = float(distances.sum(dtype=np.float64)), passes + 1
        sizes = np.bincount(clusters, minlength=len(centroids))
        empty = np.flatnonzero(sizes == 0)
        settled = len(empty) == 0 and abs(before - inertia) <= tolerance * before
        if settled or passes > max_iterations:
            return KMeansResult(centroids, clusters, distances, inertia, passes, reseeded)
        centroids = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        if len(empty):
            centroids[empty] = points.get_subset(_farthest(distances, len(empty)))
            reseeded += len(empty)
        before = 0.0 if len(empty) else inertia


def _farthest(distances: Floats, count: int) -> NDArray[np.int64]:
    """Rows with the largest distances; ties go to the first."""
    return np.argsort(-distances, kind="stable")[:count].astype(np.int64)


@dataclass(frozen=True)
class Start:
    """Initial centroids for Lloyd's algorithm: the best of several restarts."""

    centroids: Floats  # [p, k], in the original space, not the reduced one
    inertias: tuple[float, ...]  # of all restarts on the reduced points, ascending


def best_start(points: Floats, num_clusters: int, *, restarts: int, seed: int, threads: int = 1) -> Start:
    """Run k-means several times on the principal components of `points`, float32 [n, k]; keep the lowest inertia.

    Each restart begins with greedy k-means++ (Arthur & Vassilvitskii 2007) and its own named seed. At most
    RESTART_IMAGES rows and RESTART_DIMENSIONS dimensions are used.
    The result does not depend on `threads`. Raises InputError if there are fewer distinct points than clusters.
    """
    chosen = points
    if len(points) > RESTART_IMAGES:
        rows = numpy_rng(seed, "restart images").choice(len(points), RESTART_IMAGES, replace=False)
        chosen = points[np.sort(rows)]
    if (distinct := len(np.unique(chosen, axis=0))) < num_clusters:
        few = f"cannot form {num_clusters} clusters from {len(points)} images, of which {distinct} look different"
        raise InputError(
            f"{few}; give --clusters {distinct} or fewer" if distinct > 1 else f"{few}: nothing to tell apart"
        )
    # Imported here because every run imports this module; before threadpool_limits, which sees only loaded libraries.
    from sklearn.cluster import kmeans_plusplus
    from sklearn.decomposition import PCA

    # The number of threads may change BLAS's order of summation.
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        reduced = _principal_components(chosen, PCA)

        def restart(index: int) -> KMeansResult:
            state = derive(seed, "k-means++", index) % 2**32
            first, _ = kmeans_plusplus(reduced, num_clusters, random_state=state)
            return lloyd(Slices.of(reduced), first)

        results = list(pool.map(restart, range(restarts)))
    best = min(results, key=lambda result: result.inertia)
    means = cluster_sums(chosen, best.clusters, num_clusters) / np.maximum(best.sizes, 1)[:, None]
    return Start(means.astype(np.float32), tuple(sorted(result.inertia for result in results)))


def _principal_components(points: Floats, decomposition: Any) -> Floats:
    dimensions = min(RESTART_DIMENSIONS, *points.shape)
    if dimensions == points.shape[1]:
        return points
    solver = "covariance_eigh" if points.shape[0] >= points.shape[1] else "full"
    reduced = decomposition(dimensions, svd_solver=solver).fit_transform(points)
    return np.ascontiguousarray(reduced, dtype=np.float32)
