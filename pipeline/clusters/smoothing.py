"""Smoothing of points over their neighbours, so that k-means follows the crowd rather than single images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NEIGHBOURS = 16
ROUNDS = 2
_BLOCK = 1024  # rows that are searched at once


def neighbours_for(num_points: int, num_clusters: int) -> int:
    """How many neighbours to average: 16, but no more than a cluster's share, or small collections become one point."""
    return min(NEIGHBOURS, max(1, num_points // num_clusters))


def smooth(points: Floats, neighbours: int = NEIGHBOURS, *, threads: int = 1) -> Floats:
    """Replace each point by the mean of its nearest neighbours by cosine, itself included, at unit length; twice.

    points      float32 [n, k] of unit length
    neighbours  how many are averaged, at most n
    The result does not depend on `threads`.
    """
    neighbours = min(neighbours, len(points))
    for _ in range(ROUNDS):
        points = _neighbour_means(points, neighbours, threads)
    return points


def _neighbour_means(points: Floats, neighbours: int, threads: int) -> Floats:
    index = faiss.IndexFlatIP(points.shape[1])
    index.add(points)

    def block(start: int) -> Floats:
        faiss.omp_set_num_threads(1)
        _, nearest = index.search(points[start : start + _BLOCK], neighbours)
        return np.asarray(points[nearest].mean(axis=1))

    before = faiss.omp_get_max_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            blocks = list(pool.map(block, range(0, len(points), _BLOCK)))
    finally:
        faiss.omp_set_num_threads(before)
    return unit_rows(np.concatenate(blocks))


def unit_rows(rows: Floats) -> Floats:
    """The same rows at unit length; a row of zeros stays."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float32)
