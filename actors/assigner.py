"""The cluster stage on Ray: actors hold slices of features and answer with sums; only centroids travel.

Shards are split into at most SLICES slices in plan order, whatever the number of workers, and partial sums are added in
slice order: any number of workers finds bit-identical centroids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError

from actors.cluster.failures import ray_failures
from pipeline import layout
from pipeline.clusters.clustering import (
    Clustering,
    ClusterReport,
    ClusterSpace,
    FittedClusters,
    Head,
    check_enough,
    clustering_of,
    fit_clusters,
    quality,
    report_on,
    with_p99,
)
from pipeline.clusters.kmeans import RESTART_IMAGES, Floats, Ints, Part, Start, assign_slice, best_start, joined, lloyd
from pipeline.errors import ClusterError
from pipeline.hashing import derive
from pipeline.settings import Settings, clusters_for
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet, feature_keys, features_from_parquet

SLICES = 64
START_TIMEOUT_S = 600.0  # until every actor is placed
ANSWER_TIMEOUT_S = 6 * 3600.0  # of one pass over an actor's slices

Reader = Callable[[str], bytes]  # shard name -> Parquet bytes of its features
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features of a shard from the output of a run; is sent to the actors."""

    store: Store

    def __call__(self, shard: str) -> bytes:
        return self.store.read(layout.features(shard))


@dataclass(frozen=True)
class ClusteredCollection:
    """A clustering, its report, and the assignments of the fitted images if they are kept."""

    clustering: Clustering
    report: ClusterReport
    kept: Mapping[str, tuple[Ints, Floats]]  # shard -> clusters and distances; empty: nearest centroid


def slices_of(shards: Sequence[str]) -> list[list[str]]:
    """Shards in plan order, split into at most SLICES runs of neighbours."""
    parts = np.array_split(np.arange(len(shards)), min(SLICES, max(1, len(shards))))
    return [[shards[index] for index in part] for part in parts]


class Assigner:
    """Holds some slices. All its state can be read again, so a restarted actor continues where the dead one stopped."""

    def __init__(self, reader: Reader, slices: Mapping[int, Sequence[str]], seed: int) -> None:
        self._reader = reader
        self._slices = {number: list(shards) for number, shards in sorted(slices.items())}
        self._seed = seed
        self._points: dict[int, Floats] = {}
        self._hashes: dict[str, Hashes] = {}

    def sizes(self) -> dict[str, int]:
        """Number of features of each shard, in slice order."""
        return {shard: len(self._hashes_of(shard)) for shards in self._slices.values() for shard in shards}

    def smallest(self, count: int) -> Hashes:
        """The `count` smallest hashes of images held here."""
        hashes = [self._hashes_of(shard) for shards in self._slices.values() for shard in shards]
        return np.sort(np.concatenate([*hashes, np.empty(0, np.uint64)]))[:count]

    def chosen(self, highest: int) -> list[NDArray[np.float16]]:
        """Features of the images with a hash up to `highest`: one array for each slice."""
        return [
            np.concatenate([self._read(shard)[self._hashes_of(shard) <= highest] for shard in shards])
            for shards in self._slices.values()
        ]

    def assign(self, centroids: Floats) -> list[Part]:
        """One pass over the points; one result per slice."""
        return [
            assign_slice(self._points_of(number), centroids) for number in self._slices if len(self._points_of(number))
        ]

    def rows(self, number: int, indices: NDArray[Any]) -> Floats:
        """Rows of one slice."""
        return np.asarray(self._points_of(number)[indices])

    def slice_sizes(self) -> dict[int, int]:
        """Rows of each slice; reads them."""
        return {number: len(self._points_of(number)) for number in self._slices}

    def dim(self) -> int:
        return next(int(self._points_of(number).shape[1]) for number in self._slices)

    def _points_of(self, number: int) -> Floats:
        if number not in self._points:
            rows = np.concatenate([self._read(shard) for shard in self._slices[number]])
            self._points[number] = rows.astype(np.float32)
        return self._points[number]

    def _read(self, shard: str) -> NDArray[np.float16]:
        return features_from_parquet(self._reader(shard)).values

    def _hashes_of(self, shard: str) -> Hashes:
        if shard not in self._hashes:
            keys = feature_keys(self._reader(shard))
            numbers = [derive(self._seed, "cluster images", shard, key) for key in keys]
            self._hashes[shard] = np.array(numbers, dtype=np.uint64)
        return self._hashes[shard]


class AssignerPool:
    """The points of a collection over several actors, behind faiss's DatasetAssign protocol."""

    def __init__(self, reader: Reader, shards: Sequence[str], *, workers: int, seed: int) -> None:
        slices = list(enumerate(slices_of(shards)))
        dealt = np.array_split(np.arange(len(slices)), min(workers, len(slices)))
        actor = ray.remote(Assigner).options(num_cpus=1, max_restarts=3, max_task_retries=-1)
        self._actors = [actor.remote(reader, dict(slices[i] for i in part), seed) for part in dealt]
        self._owner = {int(i): held for held, part in zip(self._actors, dealt, strict=True) for i in part}
        self._sizes: dict[int, int] | None = None
        placed = [held.__ray_ready__.remote() for held in self._actors]
        answer(placed, START_TIMEOUT_S, f"{len(placed)} assigners of one CPU each could not be placed")

    def close(self) -> None:
        """Release the CPUs."""
        for held in self._actors:
            ray.kill(held)

    def shard_sizes(self) -> dict[str, int]:
        """Number of features of each shard, in plan order."""
        return {shard: size for sizes in self._all("sizes") for shard, size in sizes.items()}

    def highest_hash(self, count: int) -> int:
        """The largest hash in a sample of `count` images: the same images, whichever workers hold them."""
        hashes = np.sort(np.concatenate(self._all("smallest", count)))[:count]
        return int(hashes[-1]) if len(hashes) else 0

    def chosen(self, highest: int) -> list[Any]:
        """References to the chosen features of every actor, in slice order; the features do not move."""
        return [held.chosen.remote(highest) for held in self._actors]

    def count(self) -> int:
        return sum(self._slice_sizes().values())

    def dim(self) -> int:
        return int(answer([self._actors[0].dim.remote()])[0])

    def get_subset(self, indices: NDArray[Any]) -> Floats:
        starts = np.cumsum([0, *self._slice_sizes().values()])
        numbers = np.searchsorted(starts, indices, side="right") - 1
        wanted = [
            self._owner[int(number)].rows.remote(int(number), [int(index - starts[number])])
            for number, index in zip(numbers, indices, strict=True)
        ]
        return np.concatenate(answer(wanted))

    def assign_to(self, centroids: NDArray[Any], weights: None = None) -> tuple[Ints, Floats, NDArray[np.float64]]:
        sent = ray.put(np.ascontiguousarray(centroids, dtype=np.float32))
        return joined([part for parts in self._all("assign", sent) for part in parts])

    def _slice_sizes(self) -> dict[int, int]:
        if self._sizes is None:
            self._sizes = {number: size for sizes in self._all("slice_sizes") for number, size in sizes.items()}
        return self._sizes

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return answer([getattr(held, method).remote(*arguments) for held in self._actors])


def answer(references: Sequence[Any], timeout_s: float = ANSWER_TIMEOUT_S, what: str = "clustering") -> list[Any]:
    """The values of the references. Raises ClusterError if they take too long, and as ray_failures does."""
    with ray_failures():
        try:
            return list(ray.get(list(references), timeout=timeout_s))
        except GetTimeoutError:
            advice = "check what is using the CPUs of the cluster"
            raise ClusterError(f"{what}: no answer within {timeout_s:.0f} s; {advice}") from None


def cluster_collection(
    reader: Reader,
    shards: Sequence[str],
    num_clusters: int | None,
    settings: Settings,
    head: Head | None,
    *,
    workers: int,
) -> ClusteredCollection:
    """Cluster a collection on the connected Ray cluster; writes nothing.

    reader        shard name -> Parquet bytes of its features; picklable
    shards        names in plan order
    num_clusters  None: chosen by the number of images (settings.clusters_for)

    The driver holds centroids and one number per image, never a feature. In the space `features` every image takes
    part; in `smoothed` a hash-sample of settings.cluster_images. Raises InputError if there are fewer
    distinct images than clusters.
    """
    pool = AssignerPool(reader, shards, workers=workers, seed=settings.seed)
    try:
        sizes = pool.shard_sizes()
        num_images = sum(sizes.values())
        num_clusters = num_clusters or clusters_for(num_images, settings.generator)
        check_enough(num_images, num_clusters)
        if settings.cluster_space == "features":
            return _cluster_features(pool, num_clusters, settings)
        everything = num_images <= settings.cluster_images
        parts = pool.chosen(pool.highest_hash(settings.cluster_images))
        ray.wait(parts, num_returns=len(parts), timeout=ANSWER_TIMEOUT_S, fetch_local=False)
    finally:
        pool.close()
    threads = max(1, min(workers, _largest_node()))
    fitted: FittedClusters = _run(_fit_smoothed, num_clusters, settings, head, threads, *parts, cpus=threads)
    kept = _by_shard(fitted, sizes) if everything else {}
    return ClusteredCollection(fitted.clustering, fitted.report, kept)


def assign_shard(reader: Reader, shard: str, collection: ClusteredCollection) -> Assignment:
    """The cluster of every image of one shard: from the clustering if it kept that, else the nearest centroid."""
    features = features_from_parquet(reader(shard))
    kept = collection.kept.get(shard)
    clusters, distance = kept if kept is not None else collection.clustering.assign(features.values)
    return Assignment(shard, features.keys, clusters, distance)


def write_assignments(output: Store, shards: Sequence[str], collection: ClusteredCollection) -> int:
    """Ray task: write the assignments of some shards to the output; returns how many."""
    for shard in shards:
        assignment = assign_shard(FeatureReader(output), shard, collection)
        output.create(layout.assignment(shard), assignment_to_parquet(assignment))
    return len(shards)


def _cluster_features(pool: AssignerPool, num_clusters: int, settings: Settings) -> ClusteredCollection:
    """As in the papers: k-means on the raw features of all images."""
    sample = pool.chosen(pool.highest_hash(RESTART_IMAGES))
    start: Start = _run(_choose_start, num_clusters, settings, *sample)
    result = lloyd(pool, start.centroids)
    sizes = np.maximum(result.sizes, 1)[:, None]
    clustering = clustering_of(ClusterSpace(), result, result.centroids.astype(np.float64) * sizes)
    clustering = with_p99(clustering, result.clusters, np.sqrt(result.distances))
    measured = _run(_measure, clustering, settings, *sample)
    return ClusteredCollection(clustering, report_on(result, start.inertias, measured), {})


def _run(task: Callable[..., Any], *arguments: Any, cpus: int = 0) -> Any:
    """Run one task on a worker; with cpus = 0 it runs beside idle assigners that hold every CPU."""
    return answer([ray.remote(task).options(num_cpus=cpus, max_retries=3).remote(*arguments)])[0]


def _largest_node() -> int:
    return max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


def _by_shard(fitted: FittedClusters, sizes: Mapping[str, int]) -> dict[str, tuple[Ints, Floats]]:
    ends = np.cumsum(list(sizes.values()))[:-1]
    pairs = zip(np.split(fitted.clusters, ends), np.split(fitted.distances, ends), strict=True)
    return dict(zip(sizes, pairs, strict=True))


def _flat(parts: Sequence[list[NDArray[np.float16]]]) -> list[NDArray[np.float16]]:
    return [rows for part in parts for rows in part]


def _choose_start(num_clusters: int, settings: Settings, *parts: list[NDArray[np.float16]]) -> Start:
    rows = np.concatenate(_flat(parts)).astype(np.float32)
    return best_start(rows, num_clusters, restarts=settings.restarts, seed=settings.seed)


def _measure(clustering: Clustering, settings: Settings, *parts: list[NDArray[np.float16]]) -> Any:
    rows = np.concatenate(_flat(parts))
    return quality(clustering.space.points(rows), clustering.assign(rows)[0], settings.seed)


def _fit_smoothed(
    num_clusters: int, settings: Settings, head: Head | None, threads: int, *parts: list[NDArray[np.float16]]
) -> FittedClusters:
    return fit_clusters(
        _flat(parts),
        "smoothed",
        head,
        num_clusters,
        restarts=settings.restarts,
        seed=settings.seed,
        threads=threads,
    )
