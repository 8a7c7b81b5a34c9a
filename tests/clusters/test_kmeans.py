"""pipeline.clusters.kmeans against hand-computed sums, faiss's own k-means loop and scikit-learn."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from faiss.contrib.clustering import DatasetAssign
from faiss.contrib.clustering import kmeans as faiss_contrib_kmeans
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from pipeline.clusters.kmeans import Slices, assign_slice, best_start, cluster_sums, lloyd
from pipeline.errors import InputError
from pipeline.hashing import numpy_rng

Floats = NDArray[np.float32]


@pytest.fixture
def blobs() -> Floats:
    """600 points around 12 far centres in 20 dimensions, shuffled."""
    rng = numpy_rng(0, "test blobs")
    centres = rng.normal(scale=8, size=(12, 20))
    return (centres[rng.integers(0, 12, 600)] + rng.normal(size=(600, 20))).astype(np.float32)


@pytest.fixture
def cloud() -> Floats:
    """3,000 points without any structure: ties and near-ties everywhere."""
    return numpy_rng(1, "test cloud").normal(size=(3000, 32)).astype(np.float32)


def test_a_slice_answers_with_nearest_centroids_squared_distances_and_sums() -> None:
    points = np.array([[0, 0], [1, 0], [10, 10], [10, 12]], np.float32)
    part = assign_slice(points, np.array([[0, 0], [10, 10], [50, 50]], np.float32))
    assert part.clusters.tolist() == [0, 0, 1, 1]
    assert part.distances.tolist() == [0, 1, 0, 4]
    assert part.sums.tolist() == [[1, 0], [20, 22], [0, 0]]
    assert part.sums.dtype == np.float64
    assert part.clusters.dtype == np.int32


def test_sums_keep_what_float32_would_lose() -> None:
    points = np.array([[2.0**24], [1], [1], [1]], np.float32)
    assert cluster_sums(points, np.zeros(4, np.int32), 1).tolist() == [[2.0**24 + 3]]


def test_sums_over_many_blocks_equal_numpys_own(cloud: Floats) -> None:
    points = np.tile(cloud, (4, 1))
    clusters = numpy_rng(2, "test labels").integers(0, 7, len(points)).astype(np.int32)
    expected = [points[clusters == cluster].astype(np.float64).sum(axis=0) for cluster in range(7)]
    np.testing.assert_allclose(cluster_sums(points, clusters, 7), expected, rtol=0, atol=1e-9)


def test_assignment_equals_faiss_and_the_sums_agree_with_its_float32_ones(cloud: Floats) -> None:
    ours = Slices.of(cloud, rows=700).assign_to(cloud[:25])
    theirs = DatasetAssign(cloud).assign_to(cloud[:25])
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-3)


def test_slices_serve_faiss_own_loop(blobs: Floats, capsys: pytest.CaptureFixture[str]) -> None:
    ours = faiss_contrib_kmeans(12, Slices.of(blobs, rows=100), niter=10, verbose=False)
    theirs = faiss_contrib_kmeans(12, DatasetAssign(blobs), niter=10, verbose=False)
    capsys.readouterr()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_rows_are_found_across_slices_and_beside_empty_ones(cloud: Floats) -> None:
    slices = Slices([cloud[:3], cloud[3:3], cloud[3:10]])
    assert (slices.count(), slices.dim()) == (10, 32)
    np.testing.assert_array_equal(slices.get_subset(np.array([9, 0, 3, 2])), cloud[[9, 0, 3, 2]])


def test_any_number_of_threads_finds_the_same_centroids_to_the_bit(cloud: Floats) -> None:
    runs = [lloyd(Slices.of(cloud, rows=256, threads=threads), cloud[:20]) for threads in (1, 2, 4)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.centroids, runs[0].centroids)
        np.testing.assert_array_equal(run.clusters, runs[0].clusters)
        assert run.inertia == runs[0].inertia


def test_lloyd_reaches_what_scikit_learn_reaches_from_the_same_start(blobs: Floats) -> None:
    start = blobs[:12]
    ours = lloyd(Slices.of(blobs, rows=100), start, tolerance=0)
    theirs = KMeans(12, init=start, n_init=1, tol=0, algorithm="lloyd").fit(blobs)
    np.testing.assert_array_equal(ours.clusters, theirs.labels_)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-4)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)


def test_what_is_returned_belongs_together(cloud: Floats) -> None:
    result = lloyd(Slices.of(cloud), cloud[:9])
    apart = ((cloud[:, None] - result.centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(result.clusters, apart.argmin(axis=1))
    assert result.inertia == pytest.approx(apart.min(axis=1).sum(), rel=1e-4)
    assert result.sizes.sum() == len(cloud)


def test_an_empty_cluster_takes_the_point_farthest_from_its_centroid() -> None:
    points = np.array([[0], [1], [2], [100]], np.float32)
    result = lloyd(Slices([points]), np.array([[1], [1000]], np.float32))
    assert result.reseeded == 1
    assert result.centroids.tolist() == [[1], [100]]
    assert result.sizes.tolist() == [3, 1]


def test_no_cluster_is_left_empty_however_bad_the_start(blobs: Floats) -> None:
    start = np.full((12, 20), 1e3, np.float32)
    start[0] = 0
    result = lloyd(Slices.of(blobs), start)
    assert result.sizes.min() > 0
    assert result.reseeded >= 11


def test_lloyd_stops_at_the_iterations_allowed(cloud: Floats) -> None:
    assert lloyd(Slices.of(cloud), cloud[:30], max_iterations=3, tolerance=0).iterations == 4


def test_restarts_find_what_24_restarts_of_scikit_learn_find(blobs: Floats) -> None:
    start = best_start(blobs, 12, restarts=24, seed=0)
    ours = lloyd(Slices.of(blobs), start.centroids)
    theirs = KMeans(12, n_init=24, random_state=0).fit(blobs)
    assert ours.inertia <= theirs.inertia_ * 1.001
    assert len(start.inertias) == 24
    assert list(start.inertias) == sorted(start.inertias)
    assert start.inertias[0] == pytest.approx(ours.inertia, rel=1e-3)


def test_the_start_depends_on_the_seed_alone(cloud: Floats) -> None:
    first, again = (best_start(cloud, 8, restarts=4, seed=5, threads=threads) for threads in (1, 3))
    other = best_start(cloud, 8, restarts=4, seed=6)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.inertias == again.inertias
    assert first.inertias != other.inertias


def test_the_start_lies_in_the_space_of_the_points_not_of_their_components() -> None:
    points = numpy_rng(3, "test wide").normal(size=(500, 200)).astype(np.float32)
    start = best_start(points, 5, restarts=3, seed=0)
    assert start.centroids.shape == (5, 200)
    assert np.abs(start.centroids.mean(axis=0) - points.mean(axis=0)).max() < 0.5


def test_more_clusters_than_distinct_images_are_refused() -> None:
    points = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    few = "cannot form 4 clusters from 12 images, of which "
    with pytest.raises(InputError, match=f"^{few}3 look different; give --clusters 3 or fewer$"):
        best_start(points, 4, restarts=1, seed=0)
    with pytest.raises(InputError, match=f"^{few}1 look different: nothing to tell apart$"):
        best_start(points * 0, 4, restarts=1, seed=0)


def test_no_points_are_refused() -> None:
    with pytest.raises(InputError, match="no image could be embedded"):
        Slices([np.zeros((0, 3), np.float32)])


def test_faiss_keeps_its_threads() -> None:
    before = faiss.omp_get_max_threads()
    assign_slice(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32))
    assert faiss.omp_get_max_threads() == before
