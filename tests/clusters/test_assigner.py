"""The cluster stage on Ray against the same stage in one process, with local actors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from actors.assigner import Assigner, AssignerPool, assign_shard, cluster_collection, slices_of
from pipeline.clusters.clustering import fit_clusters
from pipeline.clusters.kmeans import Slices, lloyd
from pipeline.errors import InputError, ScumbleError
from pipeline.hashing import numpy_rng
from pipeline.records import Features
from pipeline.settings import Settings
from pipeline.surrogates.features import features_to_parquet
from tests.support.runs import local_cluster

NUM_SHARDS = 9


@dataclass(frozen=True)
class Files:
    """Shard name -> Parquet bytes."""

    contents: dict[str, bytes]

    def __call__(self, shard: str) -> bytes:
        return self.contents[shard]


def shard_rows(number: int) -> NDArray[np.float16]:
    """Shard 3 is empty, the others differ in length."""
    rng = numpy_rng(number, "test shard")
    centres = numpy_rng(0, "test centres").normal(scale=3, size=(6, 16))
    rows = 0 if number == 3 else 40 + 11 * number
    return (centres[rng.integers(0, 6, rows)] + rng.normal(size=(rows, 16))).astype(np.float16)


@pytest.fixture(scope="module")
def files() -> Files:
    contents = {}
    for number in range(NUM_SHARDS):
        rows = shard_rows(number)
        keys = tuple(f"{number}/{row:03d}" for row in range(len(rows)))
        name = f"s-{number:02d}.tar"
        contents[name] = features_to_parquet(Features(name, keys, rows), surrogate_id="s", fingerprint="f")
    return Files(contents)


@pytest.fixture(scope="module")
def names(files: Files) -> list[str]:
    return sorted(files.contents)


@pytest.fixture(scope="module")
def everything() -> list[NDArray[np.float16]]:
    return [shard_rows(number) for number in range(NUM_SHARDS)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_cluster(4):
        yield


def head() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = numpy_rng(0, "test head")
    return rng.normal(size=(10, 16)).astype(np.float32), rng.normal(size=10).astype(np.float32)


def test_shards_are_dealt_to_at_most_64_slices_in_plan_order() -> None:
    names = [f"{number:04d}" for number in range(1000)]
    slices = slices_of(names)
    assert len(slices) == 64
    assert [name for held in slices for name in held] == names
    assert slices_of(names[:2]) == [["0000"], ["0001"]]


def test_an_assigner_answers_as_slices_do(
    files: Files, names: list[str], everything: list[NDArray[np.float16]]
) -> None:
    assigner = Assigner(files, {0: names[:3], 1: names[3:4], 2: names[4:]}, seed=0)
    centroids = everything[0][:5].astype(np.float32)
    parts = assigner.assign(centroids)
    slices = Slices([np.concatenate(everything[:3]), np.concatenate(everything[4:])])
    clusters, distances, sums = slices.assign_to(centroids)
    np.testing.assert_array_equal(np.concatenate([part.clusters for part in parts]), clusters)
    np.testing.assert_array_equal(np.concatenate([part.distances for part in parts]), distances)
    np.testing.assert_array_equal(sum(part.sums for part in parts), sums)


def test_the_hash_sample_is_the_same_however_shards_are_dealt(files: Files, names: list[str]) -> None:
    whole = Assigner(files, {0: names}, seed=4)
    halves = [Assigner(files, {0: names[:4]}, seed=4), Assigner(files, {1: names[4:]}, seed=4)]
    highest = int(whole.smallest(50)[-1])
    assert highest == int(np.sort(np.concatenate([half.smallest(50) for half in halves]))[49])
    chosen = np.concatenate(whole.chosen(highest))
    assert len(chosen) == 50
    np.testing.assert_array_equal(chosen, np.concatenate([half.chosen(highest)[0] for half in halves]))


@pytest.mark.ray
def test_a_pool_is_a_point_set_like_slices_even_when_an_assigner_is_killed(
    cluster: None, files: Files, names: list[str], everything: list[NDArray[np.float16]]
) -> None:
    pool = AssignerPool(files, names, workers=2, seed=0)
    slices = Slices(everything)
    wanted = np.array([0, 682, 150, 39, 40])
    assert (pool.count(), pool.dim()) == (slices.count(), 16)
    np.testing.assert_array_equal(pool.get_subset(wanted), slices.get_subset(wanted))
    expected = lloyd(slices, slices.get_subset(wanted))
    ray.kill(pool._actors[1], no_restart=False)
    found = lloyd(pool, slices.get_subset(wanted))
    pool.close()
    np.testing.assert_array_equal(found.centroids, expected.centroids)
    np.testing.assert_array_equal(found.clusters, expected.clusters)
    assert found.inertia == expected.inertia


@pytest.mark.ray
@pytest.mark.parametrize("space", ["features", pytest.param("smoothed", marks=pytest.mark.slow)])
def test_1_2_and_4_workers_make_the_same_clustering_to_the_bit(
    cluster: None, files: Files, names: list[str], everything: list[NDArray[np.float16]], space: str
) -> None:
    settings = Settings(cluster_space=space, restarts=3, seed=2)  # type: ignore[arg-type]
    first, *others = (cluster_collection(files, names, 6, settings, head(), workers=workers) for workers in (1, 2, 4))
    for other in others:
        for name, tensor in first.clustering.to_tensors().items():
            np.testing.assert_array_equal(other.clustering.to_tensors()[name], tensor)
        assert other.report == first.report
    alone = fit_clusters(everything, space, head(), 6, restarts=3, seed=2)  # type: ignore[arg-type]
    assert alone.report.sizes == first.report.sizes
    np.testing.assert_array_equal(alone.clustering.centroids, first.clustering.centroids)
    ends = np.cumsum([0, *map(len, everything)])
    for number, shard in enumerate(names):
        assignment = assign_shard(files, shard, first)
        np.testing.assert_array_equal(assignment.clusters, alone.clusters[ends[number] : ends[number + 1]])
        assert len(assignment.keys) == len(everything[number])


@pytest.mark.ray
def test_a_large_collection_is_clustered_on_a_sample_and_the_rest_assigned(
    cluster: None, files: Files, names: list[str], everything: list[NDArray[np.float16]]
) -> None:
    settings = Settings(cluster_images=200, restarts=3)
    found = cluster_collection(files, names, None, settings, None, workers=2)
    alone = Assigner(files, dict(enumerate(slices_of(names))), seed=0)
    sample = alone.chosen(int(alone.smallest(200)[-1]))
    expected = fit_clusters(sample, "smoothed", None, 10, restarts=3, seed=0)  # 683 images: 10 clusters
    assert found.report == expected.report
    assert found.report.images == 200
    assert found.kept == {}
    np.testing.assert_array_equal(found.clustering.centroids, expected.clustering.centroids)
    assignment = assign_shard(files, names[5], found)
    np.testing.assert_array_equal(assignment.clusters, found.clustering.assign(everything[5])[0])


@pytest.mark.ray
def test_too_few_images_and_damaged_features_end_in_one_line(cluster: None, files: Files, names: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        cluster_collection(files, names, 1000, Settings(restarts=1), None, workers=1)
    assert str(caught.value) == ("cannot form 1000 clusters from 683 usable images; lower --clusters to at most 683")
    damaged = Files(files.contents | {names[1]: b"PAR1"})
    with pytest.raises(ScumbleError, match="not a Parquet file, or truncated") as failed:
        cluster_collection(damaged, names, 5, Settings(restarts=1), None, workers=1)
    assert "\n" not in str(failed.value)
