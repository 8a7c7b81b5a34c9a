"""The removal check on planted deltas: a shared one is read off, a random-phase one is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.measures.removal import blind_groups, check_removal, correlation, estimate_deltas, split_half_agreement

SIDE = 32
CLUSTERS = 4
EPSILON = 16 / 255


def content(count: int, seed: int) -> np.ndarray:
    """Pictures with a falling spectrum, as photographs have; float64 [count, 3, SIDE, SIDE] around mid grey."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None]) + 1 / SIDE
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, 3, SIDE, SIDE))) / frequency).real
    return 128 + 40 * noise / noise.std(axis=(1, 2, 3), keepdims=True)


def shared_deltas(seed: int) -> np.ndarray:
    """One delta per cluster: soft signs with structure of a few pixels, +-16 levels."""
    rough = gaussian_filter(np.random.default_rng(seed).standard_normal((CLUSTERS, 3, SIDE, SIDE)), (0, 0, 1, 1))
    return (16 * np.tanh(8 * rough)).astype(np.float32)


def random_phase_deltas(clusters: np.ndarray, seed: int) -> np.ndarray:
    """Six waves near the cluster's frequency, mirrored ones included, in every image with phases of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((SIDE, SIDE))
    own = np.array([(3, 1), (0, 6), (5, 5), (8, 2)])[clusters][:, None] + rng.normal(0, 0.6, (len(clusters), 6, 2))
    own[:, 3:, 0] *= -1
    turns = (own[..., 0, None, None] * x + own[..., 1, None, None] * y) / SIDE
    waves = np.sin(2 * np.pi * (turns + rng.uniform(size=(len(clusters), 6, 1, 1)))).sum(axis=1)
    waves /= waves.std(axis=(1, 2), keepdims=True)
    return np.repeat(16 * np.tanh(2 * waves)[:, None], 3, axis=1).astype(np.float32)


def protect(deltas: np.ndarray, seed: int) -> np.ndarray:
    return (content(len(deltas), seed) + deltas).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clusters() -> np.ndarray:
    return np.random.default_rng(7).integers(0, CLUSTERS, 800)


@pytest.fixture(scope="module")
def shared(clusters) -> np.ndarray:
    return protect(shared_deltas(1)[clusters], seed=2)


def test_a_shared_delta_is_read_off_with_the_clusters_and_without_them(clusters, shared):
    check = check_removal(shared, clusters, epsilon=EPSILON, seed=0, cluster_deltas=shared_deltas(1))
    assert min(check.known["iterated"]) > 0.9
    assert min(check.blind["iterated"]) > 0.9
    assert check.blind_purity > 0.95
    assert check.worst_blind > 0.9
    assert check.blind_left < 0.5
    assert not check.per_sample


def test_a_random_phase_texture_stays_hidden_from_averages(clusters):
    own = random_phase_deltas(clusters, seed=3)
    check = check_removal(protect(own, seed=2), clusters, epsilon=EPSILON, seed=0, own_deltas=own)
    assert check.per_sample
    assert all(max(values) < 0.2 for values in check.known.values())
    assert all(max(values) < 0.35 for values in check.blind.values())
    assert check.blind_left > 0.9


def test_more_images_show_more_of_the_delta(clusters, shared):
    few = estimate_deltas(shared[:40], clusters[:40], epsilon=EPSILON)["high_pass"]
    many = estimate_deltas(shared, clusters, epsilon=EPSILON)["high_pass"]
    truth = shared_deltas(1)
    assert correlation(few[0], truth[0]) < correlation(many[0], truth[0])


def test_estimates_of_hand_made_images_follow_their_definition():
    images = np.full((4, 3, SIDE, SIDE), 100, dtype=np.uint8)
    images[:2] += np.uint8(8)
    found = estimate_deltas(images, np.array([0, 0, 1, 1]), epsilon=EPSILON)
    assert np.allclose(found["mean"][0], 4)  # 108 minus the mean 104
    assert np.allclose(found["mean"][1], -4)
    assert np.allclose(found["high_pass"], 0, atol=1e-4)  # nothing is left of a flat image minus its blur
    assert np.allclose(found["iterated"], 0, atol=1e-4)


def test_the_third_estimate_never_leaves_the_bound(clusters, shared):
    found = estimate_deltas(shared[:8], clusters[:8], epsilon=8 / 255)["iterated"]
    assert np.abs(found).max() <= 8


def test_an_empty_group_has_the_estimate_zero(shared):
    found = estimate_deltas(shared[:10], np.array([0, 2] * 5), epsilon=EPSILON)
    assert all(not value[1].any() for value in found.values())


def test_correlation_is_numpys_and_zero_for_a_constant():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50)).astype(np.float32)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert correlation(a, np.zeros(50, dtype=np.float32)) == 0


def test_two_halves_agree_on_a_shared_delta_and_not_on_random_groups(clusters, shared):
    arbitrary = np.random.default_rng(5).integers(0, CLUSTERS, len(shared))
    assert split_half_agreement(shared, clusters, epsilon=EPSILON, seed=0) > 0.85
    own = protect(random_phase_deltas(clusters, seed=3), seed=2)
    assert split_half_agreement(own, arbitrary, epsilon=EPSILON, seed=0) < 0.5


def test_blind_groups_are_the_same_for_the_same_seed(shared):
    assert np.array_equal(blind_groups(shared, 4, seed=1), blind_groups(shared, 4, seed=1))


def test_truth_of_another_shape_or_of_two_kinds_is_refused(clusters, shared):
    with pytest.raises(ValueError, match="exactly one of cluster_deltas and own_deltas"):
        check_removal(shared, clusters, epsilon=EPSILON, seed=0)
    with pytest.raises(ValueError, match="do not fit images"):
        check_removal(shared, clusters, epsilon=EPSILON, seed=0, cluster_deltas=np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="5 cluster ids for 800 images"):
        check_removal(shared, clusters[:5], epsilon=EPSILON, seed=0, cluster_deltas=shared_deltas(1))
