"""pipeline.clusters.clustering against brute force, scikit-learn and the papers' definitions."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save
from sklearn.metrics import adjusted_rand_score, silhouette_score

from pipeline.clusters.clustering import Clustering, ClusterSpace, fit_clusters, quality, target_clusters, with_p99
from pipeline.clusters.smoothing import smooth
from pipeline.errors import InputError, SettingsError
from pipeline.fitting.assemble import clustering_from_bytes
from pipeline.hashing import numpy_rng

Floats = NDArray[np.float32]
Head = tuple[Floats, Floats]


@pytest.fixture
def features() -> NDArray[np.float16]:
    """400 features of 30 dimensions, in eight loose groups."""
    rng = numpy_rng(0, "test features")
    centres = rng.normal(scale=2, size=(8, 30))
    return (centres[np.arange(400) % 8] + rng.normal(size=(400, 30))).astype(np.float16)


@pytest.fixture
def head() -> Head:
    rng = numpy_rng(0, "test head")
    return rng.normal(size=(12, 30)).astype(np.float32), rng.normal(size=12).astype(np.float32)


def smoothed_by_brute_force(points: NDArray[np.float64]) -> NDArray[np.float64]:
    for _ in range(2):
        cosine = points @ points.T
        nearest = np.argsort(-cosine, axis=1)[:, :16]
        points = np.array([points[row].mean(axis=0) for row in nearest])
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def test_features_are_left_as_they_are_in_the_papers_space(features: NDArray[np.float16], head: Head) -> None:
    space = ClusterSpace.fit("features", features, head)
    assert space.name == "features"
    np.testing.assert_array_equal(space.points(features), features.astype(np.float32))


def test_the_smoothed_space_holds_centred_class_scores_of_unit_length(
    features: NDArray[np.float16], head: Head
) -> None:
    space = ClusterSpace.fit("smoothed", features, head)
    scores = features.astype(np.float64) @ head[0].T.astype(np.float64) + head[1]
    scores -= scores.mean(axis=0)
    expected = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(space.points(features), expected, atol=1e-5)


def test_without_a_classifier_the_features_themselves_are_centred(features: NDArray[np.float16]) -> None:
    points = ClusterSpace.fit("smoothed", features, None).points(features)
    wide = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(points, wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-5)


def test_a_feature_in_the_middle_of_the_collection_gives_no_nan() -> None:
    rows = np.array([[1, 1], [-1, -1], [0, 0]], np.float16)
    assert np.isfinite(ClusterSpace.fit("smoothed", rows, None).points(rows)).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_smoothing_equals_brute_force(features: NDArray[np.float16], threads: int) -> None:
    points = ClusterSpace.fit("smoothed", features, None).points(features)
    expected = smoothed_by_brute_force(points.astype(np.float64))
    np.testing.assert_allclose(smooth(points, threads=threads), expected, atol=1e-5)


def test_smoothing_fewer_points_than_neighbours_gives_their_common_direction() -> None:
    points = np.array([[1, 0], [0, 1]], np.float32)
    np.testing.assert_allclose(smooth(points), np.full((2, 2), 0.5**0.5), atol=1e-6)


def test_nine_images_fall_into_the_four_groups_that_they_are_in() -> None:
    """With as many neighbours as images, every point becomes the mean of all and nothing is left to group."""
    directions = np.eye(4, 6)[[0, 0, 0, 1, 1, 2, 2, 3, 3]]
    rows = (3 * directions + numpy_rng(0, "jitter").normal(scale=0.05, size=(9, 6))).astype(np.float16)
    fitted = fit_clusters([rows], "smoothed", None, 4, restarts=8, seed=0)
    assert adjusted_rand_score([0, 0, 0, 1, 1, 2, 2, 3, 3], fitted.clusters) == 1


@pytest.mark.parametrize("space", ["features", "smoothed"])
def test_clusters_find_the_groups(
    features: NDArray[np.float16], head: Head, space: Literal["features", "smoothed"]
) -> None:
    fitted = fit_clusters([features[:150], features[150:]], space, head, 8, restarts=8, seed=0)
    assert adjusted_rand_score(np.arange(400) % 8, fitted.clusters) > 0.9
    assert sum(fitted.report.sizes) == fitted.report.images == 400


@pytest.mark.parametrize("space", ["features", "smoothed"])
def test_any_number_of_threads_makes_the_same_clustering_to_the_bit(
    features: NDArray[np.float16], head: Head, space: Literal["features", "smoothed"]
) -> None:
    first, *others = (
        fit_clusters(np.array_split(features, 5), space, head, 8, restarts=3, seed=1, threads=threads)
        for threads in (1, 2, 4)
    )
    for other in others:
        for name, tensor in first.clustering.to_tensors().items():
            np.testing.assert_array_equal(other.clustering.to_tensors()[name], tensor)
        np.testing.assert_array_equal(other.clusters, first.clusters)


def test_delta_is_aimed_at_the_mean_surrogate_feature_of_a_cluster(features: NDArray[np.float16], head: Head) -> None:
    fitted = fit_clusters([features], "smoothed", head, 8, restarts=3, seed=0)
    expected = [features[fitted.clusters == i].astype(np.float64).mean(axis=0) for i in range(8)]
    np.testing.assert_allclose(fitted.clustering.feature_means, expected, atol=1e-5)


def test_in_the_papers_space_means_and_centroids_are_the_same(features: NDArray[np.float16]) -> None:
    clustering = fit_clusters([features], "features", None, 8, restarts=3, seed=0).clustering
    np.testing.assert_allclose(clustering.feature_means, clustering.centroids, atol=1e-3)


def test_of_few_fitted_images_none_lies_beyond_the_cluster_s_p99(features: NDArray[np.float16], head: Head) -> None:
    clustering = fit_clusters([features], "features", head, 2, restarts=1, seed=0).clustering
    distances = np.array([0.1, 0.2, 0.7, 0.3, 0.4])
    found = with_p99(clustering, np.array([0, 0, 0, 1, 1]), distances)
    assert found.distance_p99 == pytest.approx([0.7, 0.4])


@pytest.mark.parametrize("space", ["features", "smoothed"])
def test_one_in_a_hundred_fitted_images_lies_beyond_the_cluster_s_p99(
    features: NDArray[np.float16], head: Head, space: Literal["features", "smoothed"]
) -> None:
    fitted = fit_clusters([features], space, head, 4, restarts=3, seed=0)
    points = fitted.clustering.space.points(features)
    distances = np.linalg.norm(points - fitted.clustering.centroids[fitted.clusters], axis=1)
    np.testing.assert_allclose(fitted.distances, distances, rtol=1e-5)
    for cluster in range(4):
        own = distances[fitted.clusters == cluster]
        limit = fitted.clustering.distance_p99[cluster]
        assert (own > limit).sum() == (len(own) - 1) // 100


def test_assign_goes_to_the_nearest_centroid_and_says_how_far(features: NDArray[np.float16], head: Head) -> None:
    clustering = fit_clusters([features], "smoothed", head, 8, restarts=3, seed=0).clustering
    apart = np.linalg.norm(clustering.space.points(features)[:, None] - clustering.centroids[None], axis=2)
    clusters, distances = clustering.assign(features)
    np.testing.assert_array_equal(clusters, apart.argmin(axis=1))
    np.testing.assert_allclose(distances, apart.min(axis=1), atol=1e-3)
    assert (clusters.dtype, distances.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("space", ["features", "smoothed"])
def test_a_clustering_survives_its_tensors(
    features: NDArray[np.float16], head: Head, space: Literal["features", "smoothed"]
) -> None:
    clustering = fit_clusters([features], space, head, 8, restarts=2, seed=0).clustering
    back = Clustering.from_tensors(clustering.to_tensors() | {"deltas": np.zeros(3)})
    assert back.space.name == space
    for mine, its in zip(clustering.assign(features), back.assign(features), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_tensors_of_something_else_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        clustering_from_bytes(save({"space.mean": np.zeros(3)}))
    assert str(caught.value) == "not a clustering, or truncated: 'centroids'; delete the file to cluster again"


def test_tensors_that_do_not_fit_each_other_are_refused(features: NDArray[np.float16], head: Head) -> None:
    tensors = fit_clusters([features], "smoothed", head, 8, restarts=2, seed=0).clustering.to_tensors()
    for name, change in (
        ("centroids", lambda array: array[:, :-1]),
        ("feature_means", lambda array: array[1:]),
        ("distance_p99", lambda array: array[:, None]),
        ("space.mean", lambda array: array[1:]),
        ("space.weight", lambda array: array.T),
        ("centroids", lambda array: np.where(array == array[3, 0], np.nan, array)),
        ("space.bias", lambda array: array + np.inf),
    ):
        with pytest.raises(ValueError, match="of shape|not finite"):
            Clustering.from_tensors(tensors | {name: change(tensors[name])})


def test_more_clusters_than_images_are_refused(features: NDArray[np.float16]) -> None:
    with pytest.raises(InputError) as caught:
        fit_clusters([features[:5]], "features", None, 6, restarts=1, seed=0)
    assert str(caught.value) == ("cannot form 6 clusters from 5 usable images; lower --clusters to at most 5")


def test_quality_counts_neighbours_of_the_same_cluster(features: NDArray[np.float16]) -> None:
    points = features.astype(np.float32)
    clusters = (np.arange(400) % 8).astype(np.int32)
    measured = quality(points, clusters, seed=0)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = np.argsort(apart, axis=1)[:, :10]
    assert measured.neighbour_agreement == pytest.approx((clusters[nearest] == clusters[:, None]).mean(), abs=1e-3)
    assert measured.silhouette == pytest.approx(silhouette_score(points, clusters), abs=1e-6)


def test_quality_of_twins_does_not_count_an_image_as_its_own_neighbour() -> None:
    points = np.repeat(np.eye(2, dtype=np.float32), 20, axis=0)
    clusters = np.arange(40, dtype=np.int32) % 2
    assert quality(points, clusters, seed=0).neighbour_agreement == pytest.approx(9.5 / 19, abs=0.1)


def test_quality_is_judged_on_a_sample_of_a_large_collection() -> None:
    rng = numpy_rng(0, "test large")
    clusters = rng.integers(0, 2, 5000).astype(np.int32)
    points = (clusters[:, None] * 20 + rng.normal(size=(5000, 3))).astype(np.float32)
    measured = quality(points, clusters, seed=0)
    assert measured.neighbour_agreement == 1
    assert measured.silhouette is not None
    assert measured.silhouette > 0.8


def test_a_silhouette_that_is_not_defined_is_left_out() -> None:
    assert quality(np.eye(3, dtype=np.float32), np.zeros(3, np.int32), seed=0).silhouette is None


def test_next_is_one_cycle_through_all_clusters() -> None:
    targets = target_clusters(np.zeros((5, 2)), "next")
    assert targets.tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("num_clusters", [2, 3, 6])
def test_far_is_the_best_of_all_derangements(num_clusters: int) -> None:
    centroids = numpy_rng(num_clusters, "test far").normal(size=(num_clusters, 4))
    apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=2)
    rows = range(num_clusters)
    best = max(
        sum(apart[i, t] for i, t in enumerate(targets))
        for targets in itertools.permutations(rows)
        if all(i != t for i, t in enumerate(targets))
    )
    targets = target_clusters(centroids, "far")
    assert sorted(targets) == list(rows)
    assert apart[np.arange(num_clusters), targets].sum() == pytest.approx(best)


def test_far_has_no_fixed_point_even_among_equal_centroids_and_is_no_nearer_than_next() -> None:
    for seed in range(5):
        centroids = numpy_rng(seed, "test far 40").normal(size=(40, 8))
        centroids[10:20] = centroids[10]
        sums = {}
        for permutation in ("next", "far"):
            targets = target_clusters(centroids, permutation)  # type: ignore[arg-type]
            assert (targets != np.arange(40)).all()
            assert len(set(targets)) == 40
            sums[permutation] = np.linalg.norm(centroids - centroids[targets], axis=1).sum()
        assert sums["far"] >= sums["next"]


def test_a_single_cluster_has_no_target() -> None:
    with pytest.raises(SettingsError, match="--clusters must be at least 2"):
        target_clusters(np.zeros((1, 3)), "next")
