"""Keyed textures share a statistic within a cluster, never a picture, and the key decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.deltas.textures import JITTER, SEPARATION, Bands, bands_for, check_key
from pipeline.errors import InputError, SettingsError
from pipeline.settings import NUM_BANDS

KEY = b"sixteen bytes ok"
EPSILON = 16 / 255


@pytest.fixture(scope="module")
def bands() -> Bands:
    return bands_for(KEY, 10)


def spectrum(levels: NDArray[np.int16]) -> NDArray[np.float64]:
    return np.asarray(np.abs(np.fft.fft2(levels[:, :, 0].astype(float))) ** 2)


def mean_spectrum(bands: Bands, cluster: int, count: int, flip: bool, start: int = 0) -> NDArray[np.float64]:
    total = np.zeros((32, 32))
    for index in range(start, start + count):
        levels = bands.levels(cluster, f"image-{index}", 32, 32, EPSILON)
        total += spectrum(levels[:, ::-1] if flip else levels)
    return total / count


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 333), (33, 31), (600, 41)])
@pytest.mark.parametrize("epsilon", [16 / 255, 8 / 255, 0.05, 1 / 255])
def test_the_bound_holds_at_every_size(bands: Bands, height: int, width: int, epsilon: float) -> None:
    levels = bands.levels(4, "a/b c", height, width, epsilon)
    assert levels.shape == (height, width, 3)
    assert levels.dtype == np.int16
    assert np.abs(levels).max() <= epsilon * 255 + 1e-6
    assert np.array_equal(levels[:, :, 0], levels[:, :, 1])
    assert np.array_equal(levels[:, :, 0], levels[:, :, 2])


def test_a_texture_is_sum_over_deviation_times_two_squashed(bands: Bands) -> None:
    values = bands.levels(0, "x", 64, 64, 120 / 255)[:, :, 0] / 120
    deviations = np.arctanh(np.clip(values, -0.999, 0.999)) / 2
    for limit, share in ((0.5, 0.383), (1.0, 0.683)):  # of a normal distribution, which twelve waves nearly have
        assert (np.abs(deviations) < limit).mean() == pytest.approx(share, abs=0.08)
    assert values.max() > 0.98


def test_flips_leave_the_spectrum_of_a_cluster_as_it_was(bands: Bands) -> None:
    straight, again = (mean_spectrum(bands, 0, 300, flip=False, start=start) for start in (0, 300))
    flipped = mean_spectrum(bands, 0, 300, flip=True, start=600)
    chance = np.abs(straight - again).sum() / straight.sum()
    assert np.abs(straight - flipped).sum() / straight.sum() < 1.3 * chance
    assert np.corrcoef(straight.ravel(), flipped.ravel())[0, 1] > 0.9


def test_spectra_tell_clusters_apart(bands: Bands) -> None:
    means = [mean_spectrum(bands, cluster, 60, flip=False) for cluster in range(10)]
    hits = 0
    for cluster in range(10):
        for index in range(5):
            seen = spectrum(bands.levels(cluster, f"new-{index}", 32, 32, EPSILON))
            likeness = [np.corrcoef(seen.ravel(), mean.ravel())[0, 1] for mean in means]
            hits += int(np.argmax(likeness)) == cluster
    assert hits >= 45


def test_two_samples_of_a_cluster_are_uncorrelated_and_their_mean_vanishes(bands: Bands) -> None:
    deltas = np.stack([bands.levels(2, str(index), 32, 32, EPSILON)[:, :, 0] for index in range(300)]).astype(float)
    assert np.sqrt((deltas.mean(0) ** 2).mean()) < 2 * np.sqrt((deltas**2).mean() / 300)
    pairs = np.corrcoef(deltas.reshape(300, -1)) - np.eye(300)
    assert abs(pairs.mean()) < 0.01


def test_a_sample_has_the_same_texture_at_every_size(bands: Bands) -> None:
    small = bands.levels(1, "k", 48, 48, EPSILON)[:, :, 0]
    large = bands.levels(1, "k", 144, 144, EPSILON)[:, :, 0]
    assert np.array_equal(small, large[1::3, 1::3])  # the middles of the small pixels


def test_the_same_key_gives_the_same_bytes_and_another_key_other_bands(bands: Bands) -> None:
    again, other = bands_for(KEY, 10), bands_for(b"another 16 bytes", 10)
    assert np.array_equal(bands.levels(1, "k", 9, 11, EPSILON), again.levels(1, "k", 9, 11, EPSILON))
    for cluster in range(10):
        assert not np.allclose(bands.middles[cluster], other.middles[cluster], atol=0.1)


@pytest.mark.parametrize("key", [b"0" * 16, b"1" * 32, bytes(range(64))])
@pytest.mark.parametrize("clusters", [1, 10, 20, 21, NUM_BANDS])
def test_bands_are_distinct_and_well_apart(key: bytes, clusters: int) -> None:
    middles = bands_for(key, clusters).middles
    assert middles.shape == (clusters, 2 if clusters <= 20 else 1, 2)
    flat = middles.reshape(-1, 2)
    apart = np.linalg.norm(flat[:, None] - flat[None], axis=2) + 99 * np.eye(len(flat))
    assert apart.min() >= SEPARATION > 4 * JITTER
    assert np.linalg.norm(flat, axis=1).max() <= 14


def test_more_clusters_than_bands_are_refused() -> None:
    with pytest.raises(SettingsError, match="--clusters must be at most 40, not 41"):
        bands_for(KEY, 41)


def test_a_short_key_is_refused_and_a_key_is_never_shown(bands: Bands) -> None:
    with pytest.raises(InputError, match="has 15 bytes; it needs at least 16"):
        check_key(KEY[:15])
    assert "sixteen" not in repr(bands)
    assert "sixteen" not in check_key(KEY)
