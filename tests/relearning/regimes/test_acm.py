"""The activation cluster measure of Dang et al., by hand, against scikit-learn, and on what it must not see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from pipeline.errors import InputError
from pipeline.relearning.regimes.staged.acm import VARIANTS, activation_cluster_measure, validation_rows
from pipeline.relearning.regimes.staged.pseudo_labels import pseudo_labels

# centre (1, 0), mean distance 1, radius 1; centre (9, 0), mean distance 2, radius 3; centres 8 apart
TWO_CLASSES = np.array([[0, 0], [2, 0], [9, -3], [9, -1], [9, 1], [9, 3]], dtype=np.float64)
TWO_LABELS = np.array([0, 0, 1, 1, 1, 1])
BETWEEN = (math.sqrt(90) + math.sqrt(82) + math.sqrt(58) + math.sqrt(50)) / 4


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("db_inverse", 8 / (1 + 2)),
        ("radius_ratio", 8 / (1 + 3)),
        ("gap", (8 - 1 - 3) / (1 + 2)),
        ("ratio_of_means", 8 / 1.5),
        ("mean_of_pairs", BETWEEN / (2 + (2 + 4 + 6 + 2 + 4 + 2) / 6)),
    ],
)
def test_acm_of_two_classes_is_what_the_hand_finds(variant, expected):
    found = activation_cluster_measure(TWO_CLASSES, TWO_LABELS, variant=variant, reduce="none")
    assert found == pytest.approx(expected, rel=1e-12)


def test_acm_averages_over_all_pairs_of_classes():
    centres = np.array([[0, 0], [6, 8], [0, 8]])  # 10, 8 and 6 apart
    points = np.concatenate([centre + [[1, 0], [-1, 0]] for centre in centres])
    labels = np.repeat([4, 7, 9], 2)
    assert activation_cluster_measure(points, labels, reduce="none") == pytest.approx((10 + 8 + 6) / 3 / 2)
    assert activation_cluster_measure(points, labels, variant="gap", reduce="none") == pytest.approx((8 + 6 + 4) / 6)


def test_acm_of_two_classes_is_the_inverse_of_sklearns_davies_bouldin():
    features, labels = blobs(2, apart=3)
    expected = 1 / davies_bouldin_score(features, labels)
    assert activation_cluster_measure(features, labels, reduce="none") == pytest.approx(expected, rel=1e-6)


def blobs(num_classes: int, apart: float, count: int = 30, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), count)
    centres = rng.standard_normal((num_classes, size))
    return rng.standard_normal((len(labels), size)) + apart * centres[labels], labels


@pytest.mark.parametrize("variant", VARIANTS)
def test_acm_grows_as_blobs_part_and_does_not_see_motion_or_scale(variant):
    found = []
    for apart in (0, 1, 2, 4, 8):
        features, labels = blobs(4, apart)
        found.append(activation_cluster_measure(features, labels, variant=variant, reduce="none"))
    assert found == sorted(found)
    assert found[-1] > found[0]
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))
    moved = 37.0 * features @ turn + 5
    for reduce in ("none", "pca2"):
        before, after = (
            activation_cluster_measure(x, labels, variant=variant, reduce=reduce) for x in (features, moved)
        )
        assert after == pytest.approx(before, rel=1e-6)


def test_acm_on_a_tsne_map_is_higher_for_parted_blobs_and_the_same_twice():
    near, far = (activation_cluster_measure(*blobs(3, apart), seed=1) for apart in (0.0, 6.0))
    assert far > 2 * near
    assert activation_cluster_measure(*blobs(3, 6.0), seed=1) == far


def test_acm_of_collapsed_features_is_zero_and_of_points_infinite():
    labels = np.array([0, 0, 1, 1])
    for reduce in ("tsne", "pca2", "none"):
        assert activation_cluster_measure(np.ones((4, 3), np.float32), labels, reduce=reduce) == 0
    points = np.array([[0.0, 0], [0, 0], [1, 0], [1, 0]])
    assert activation_cluster_measure(points, labels, reduce="none") == math.inf


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3]])
def test_too_few_samples_for_acm_are_one_clear_line(labels):
    with pytest.raises(InputError, match="needs at least 2 classes with at least 2 samples each") as refused:
        activation_cluster_measure(np.zeros((4, 2)), np.array(labels))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="needs at least 2 classes"):
        validation_rows(np.array(labels))


def test_classes_of_one_sample_do_not_count():
    features = np.concatenate([TWO_CLASSES, [[500.0, 500.0]]])
    labels = np.append(TWO_LABELS, 2)
    assert activation_cluster_measure(features, labels, reduce="none") == pytest.approx(8 / 3)


def test_the_validation_subset_is_the_papers():
    rng = np.random.default_rng(0)
    ten, hundred = rng.integers(0, 10, 5_000), rng.integers(0, 100, 20_000)
    rows = validation_rows(ten)
    assert np.bincount(ten[rows]).tolist() == [100] * 10
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, validation_rows(ten))
    assert not np.array_equal(rows, validation_rows(ten, seed=1))
    assert np.bincount(hundred[validation_rows(hundred)]).tolist() == [50] * 10
    assert len(validation_rows(np.repeat(np.arange(10), 7))) == 70


def test_pseudo_labels_find_groups_that_labels_do_not_name():
    features, groups = blobs(3, apart=10)
    found = pseudo_labels(features.astype(np.float32), 3)
    assert len(set(zip(groups.tolist(), found.tolist(), strict=True))) == 3
    other = np.tile([0, 1, 2], 30)
    assert activation_cluster_measure(features, found, reduce="none") > 5
    assert activation_cluster_measure(features, other, reduce="none") < 1
