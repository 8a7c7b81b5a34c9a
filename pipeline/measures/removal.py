"""The removal check: how well deltas can be estimated back from the protected images alone, by averaging.

Over a group of images, content averages out but a shared delta does not. Whoever can estimate the delta can subtract
it, and most of the protection with it; a high correlation here is bad news, whatever ordinary training shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from pipeline.hashing import derive, numpy_rng
from pipeline.json_record import JsonRecord

Pixels = NDArray[np.uint8]  # [n, 3, S, S]
ESTIMATES = ("mean", "high_pass", "iterated")
_ROUNDS = 6
_COMPONENTS = 40
_FIT_IMAGES = 4_000  # principal components are fitted on at most this many images
_BLOCK = 512  # images in float at a time


@dataclass(frozen=True)
class RemovalCheck(JsonRecord):
    """Correlation of estimated and true deltas, per cluster, for each of ESTIMATES; 1 = recovered exactly, 0 = hidden.

    known          images grouped by their true clusters: the best that averaging can do
    blind          images grouped by their pixels alone, without labels or networks
    blind_purity   share of images whose blind group is the one matched to their cluster
    blind_left     RMS of (delta - `iterated` estimate) over RMS of delta: what subtraction leaves; 1 = all of it
    per_sample     True if every image has its own delta; correlations are then means over a cluster's images
    """

    num_images: int
    known: Mapping[str, tuple[float, ...]]
    blind: Mapping[str, tuple[float, ...]]
    blind_purity: float
    blind_left: float
    per_sample: bool

    @property
    def worst_blind(self) -> float:
        """The highest mean correlation of any estimate with groups found in the pixels alone."""
        return max(float(np.mean(values)) for values in self.blind.values())

    @property
    def worst_known(self) -> float:
        """The highest mean correlation of any estimate with the true clusters, which embeddings may reveal."""
        return max(float(np.mean(values)) for values in self.known.values())


def estimate_deltas(images: Pixels, groups: NDArray[np.int64], *, epsilon: float) -> dict[str, NDArray[np.float32]]:
    """Three estimates of each group's delta, float32 [groups, 3, S, S] in 8-bit levels; an empty group gets zeros.

    mean        (a) the group's mean image minus the mean of all images
    high_pass   (b) the group's mean image minus its blur (Gaussian, sigma S/16)
    iterated    (c) like (b), for six rounds in which mean minus estimate is blurred, to recover coarse parts of the
                delta too; squashed to +-epsilon by tanh in each round
    """
    means, counts = _group_means(images, groups)
    overall = (means * counts[:, None, None, None]).sum(axis=0) / counts.sum()
    present = (counts > 0)[:, None, None, None]
    means = np.where(present, means, overall)
    bound = epsilon * 255
    iterated = np.zeros_like(means)
    for _ in range(_ROUNDS):
        iterated = bound * np.tanh((means - _blur(means - iterated)) / bound)
    estimates = {"mean": means - overall, "high_pass": means - _blur(means), "iterated": iterated}
    return {name: np.where(present, value, 0).astype(np.float32) for name, value in estimates.items()}


def blind_groups(images: Pixels, num_groups: int, *, seed: int) -> NDArray[np.int64]:
    """Group ids int64 [n] by k-means on 40 principal components of the high-passed pixels: no label, no network."""
    from sklearn.cluster import KMeans  # imported here: it takes a second that most commands do not need
    from sklearn.decomposition import PCA

    num_groups = min(num_groups, len(images))
    chosen = numpy_rng(seed, "blind-components").permutation(len(images))[:_FIT_IMAGES]
    components = min(_COMPONENTS, len(chosen), images[0].size)
    random_state = derive(seed, "blind-groups") % 2**32
    pca = PCA(components, svd_solver="randomized", random_state=random_state)
    pca.fit(_high_passed(images[np.sort(chosen)]))
    blocks = [pca.transform(_high_passed(images[start : start + _BLOCK])) for start in range(0, len(images), _BLOCK)]
    kmeans = KMeans(num_groups, n_init=10, random_state=random_state)
    return kmeans.fit_predict(np.concatenate(blocks)).astype(np.int64)  # type: ignore[no-any-return]


def split_half_agreement(images: Pixels, groups: NDArray[np.int64], *, epsilon: float, seed: int) -> float:
    """Correlation between estimates (c) from two random halves of the images, averaged over groups."""
    order = numpy_rng(seed, "split-half").permutation(len(images))
    halves = [
        estimate_deltas(images[half], groups[half], epsilon=epsilon)["iterated"]
        for half in (np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :]))
    ]
    num_groups = min(len(half) for half in halves)
    return float(np.mean([correlation(halves[0][g], halves[1][g]) for g in range(num_groups)]))


def check_removal(
    protected: Pixels,
    clusters: NDArray[np.int64],
    *,
    epsilon: float,
    seed: int,
    cluster_deltas: NDArray[np.float32] | None = None,
    own_deltas: NDArray[np.float32] | None = None,
) -> RemovalCheck:
    """Estimate every cluster's delta from `protected` alone and compare it with the truth.

    protected        uint8 [n, 3, S, S], as read back from the output
    clusters         int64 [n], 0 ... p-1
    cluster_deltas   [p, 3, S, S] in 8-bit levels, if a cluster's images share one delta
    own_deltas       [n, 3, S, S] in 8-bit levels, if every image has its own delta; give exactly one of the two
    Raises ValueError if shapes disagree or if not exactly one of the two is given.
    """
    _check_shapes(protected, clusters, cluster_deltas, own_deltas)
    num_clusters = int(clusters.max()) + 1 if cluster_deltas is None else len(cluster_deltas)
    blind = blind_groups(protected, num_clusters, seed=seed)
    match = _match(clusters, blind, num_clusters)
    by_cluster = estimate_deltas(protected, clusters, epsilon=epsilon)
    by_pixels = estimate_deltas(protected, blind, epsilon=epsilon)
    if cluster_deltas is not None:
        present = [c for c in range(num_clusters) if (clusters == c).any()]
        known_pairs = [[(c, c)] for c in present]
        blind_pairs = [[(c, match[c])] for c in present]
        truth: NDArray[np.float32] = cluster_deltas
    else:
        assert own_deltas is not None
        rows = [np.flatnonzero(clusters == c).tolist() for c in range(num_clusters)]
        known_pairs = [[(n, int(clusters[n])) for n in members] for members in rows if members]
        blind_pairs = [[(n, int(blind[n])) for n in members] for members in rows if members]
        truth = own_deltas
    return RemovalCheck(
        num_images=len(protected),
        known={name: _correlations(truth, by_cluster[name], known_pairs) for name in ESTIMATES},
        blind={name: _correlations(truth, by_pixels[name], blind_pairs) for name in ESTIMATES},
        blind_purity=float(np.mean(np.asarray(match)[clusters] == blind)),
        blind_left=_left(truth, by_pixels["iterated"], blind_pairs),
        per_sample=cluster_deltas is None,
    )


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Pearson correlation of two arrays of equal shape; 0 if either is constant."""
    a, b = (array.astype(np.float64).ravel() - array.mean(dtype=np.float64) for array in (first, second))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


Pairs = list[list[tuple[int, int]]]  # per cluster: (row of the truth, group of the estimate)


def _correlations(truth: NDArray[np.float32], estimate: NDArray[np.float32], pairs: Pairs) -> tuple[float, ...]:
    return tuple(
        float(np.mean([correlation(truth[row], estimate[group]) for row, group in members])) for members in pairs
    )


def _left(truth: NDArray[np.float32], estimate: NDArray[np.float32], pairs: Pairs) -> float:
    shares = [
        float(np.sqrt(np.mean((truth[row] - estimate[group]) ** 2) / max(np.mean(truth[row] ** 2), 1e-9)))
        for members in pairs
        for row, group in members
    ]
    return float(np.mean(shares))


def _match(clusters: NDArray[np.int64], blind: NDArray[np.int64], num_clusters: int) -> list[int]:
    """The blind group matched to each cluster, one to one, maximising the number of images that agree."""
    table = np.zeros((num_clusters, max(num_clusters, int(blind.max()) + 1)), dtype=np.int64)
    np.add.at(table, (clusters, blind), 1)
    return [int(group) for group in linear_sum_assignment(table, maximize=True)[1]]


def _group_means(images: Pixels, groups: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    num_groups = int(groups.max()) + 1
    counts = np.bincount(groups, minlength=num_groups)
    means = np.zeros((num_groups, *images.shape[1:]))
    for group in np.flatnonzero(counts):
        members = np.flatnonzero(groups == group)
        for start in range(0, len(members), _BLOCK):
            means[group] += images[members[start : start + _BLOCK]].sum(axis=0, dtype=np.int64)
        means[group] /= counts[group]
    return means, counts


def _blur(images: NDArray[np.float64]) -> NDArray[np.float64]:
    sigma = images.shape[-1] / 16
    return gaussian_filter(images, (0, 0, sigma, sigma))  # type: ignore[no-any-return]


def _high_passed(images: Pixels) -> NDArray[np.float32]:
    blocks = []
    sigma = images.shape[-1] / 16
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].astype(np.float32)
        block -= gaussian_filter(block, (0, 0, sigma, sigma))
        blocks.append(block.reshape(len(block), -1))
    return np.concatenate(blocks)


def _check_shapes(
    protected: Pixels,
    clusters: NDArray[np.int64],
    cluster_deltas: NDArray[np.float32] | None,
    own_deltas: NDArray[np.float32] | None,
) -> None:
    if (cluster_deltas is None) == (own_deltas is None):
        raise ValueError("give exactly one of cluster_deltas and own_deltas: the truth to compare with")
    if len(clusters) != len(protected) or len(protected) == 0:
        raise ValueError(f"{len(clusters)} cluster ids for {len(protected)} images")
    if cluster_deltas is not None and cluster_deltas.shape[1:] != protected.shape[1:]:
        raise ValueError(f"deltas {cluster_deltas.shape} do not fit images {protected.shape}")
    if own_deltas is not None and own_deltas.shape != protected.shape:
        raise ValueError(f"own deltas {own_deltas.shape} do not fit images {protected.shape}")
