"""Regimes that work on spectra, against NumPy's FFT, SciPy's Gaussian and what waves must become by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pipeline.relearning.regimes import Regime, find_regime
from pipeline.relearning.regimes.views.spectrum import find_peaks, log_spectra, mean_amplitude

NONE = torch.zeros(1)


def wave(down: int, across: int, phase: NDArray[np.float64] | float = 0.0, side: int = 32) -> NDArray[np.float64]:
    """cos of whole cycles per image, [..., side, side]."""
    rows, columns = np.indices((side, side))
    return np.cos(2 * np.pi * (down * rows + across * columns) / side + np.asarray(phase)[..., None, None])


def levels(pixels: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(pixels.round().clip(0, 255).astype(np.uint8))


def textures(count: int, seed: int, slope: float | NDArray[np.float64] = 1.0) -> NDArray[np.float64]:
    """Random fields [count, 3, 32, 32] about 128, deviation 20, whose amplitudes fall as frequency to the -slope."""
    rng = np.random.default_rng(seed)
    spectra = np.fft.fft2(rng.normal(size=(count, 3, 32, 32)))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(32, 1 / 32), np.fft.fftfreq(32, 1 / 32)))
    radius[0, 0] = np.inf
    fields = np.fft.ifft2(spectra * radius ** -np.reshape(slope, (-1, 1, 1, 1))).real
    return 128 + 20 * fields / fields.std((2, 3), keepdims=True)


def powers(images: Tensor) -> NDArray[np.float64]:
    return np.abs(np.fft.fft2(images.numpy().astype(float))) ** 2


def smoothed(images: Tensor) -> NDArray[np.float64]:
    """The definition: |FFT| without the mean, Gaussian of sigma 1 on the torus of frequencies."""
    pixels = images.numpy().astype(float)
    amplitudes = np.abs(np.fft.fft2(pixels - pixels.mean((2, 3), keepdims=True)))
    return gaussian_filter(amplitudes, (0, 0, 1, 1), mode="wrap", truncate=4)


# --- filters --------------------------------------------------------------------------------------------------------


def test_a_coarse_and_a_fine_wave_are_told_apart_and_the_mean_is_kept():
    coarse, fine = 40 * wave(0, 3, side=64), 30 * wave(20, 0, side=64)
    images = levels(np.broadcast_to(120 + coarse + fine, (2, 3, 64, 64)))
    for name, left in (("highpass:8", fine), ("lowpass:8", coarse), ("highpass:20", 0 * fine), ("lowpass:2", 0 * fine)):
        regime = find_regime(name)
        found = regime.prepare(images, NONE, seed=0)
        assert np.abs(found.numpy() - (120 + left)).max() < 1.5, name
        assert torch.equal(regime.prepare_test(images), found)


@pytest.mark.parametrize("side", [32, 72])
def test_the_cutoff_is_a_radius_in_cycles_per_image_and_lies_in_the_low_band(side):
    images = levels(np.broadcast_to(128 + 50 * wave(6, -8, side=side), (1, 3, side, side)))
    for name in ("lowpass:10", "highpass:9.9"):
        assert int((find_regime(name).prepare_test(images).int() - images.int()).abs().max()) <= 1
    for name in ("lowpass:9.9", "highpass:10"):
        assert int((find_regime(name).prepare_test(images).int() - 128).abs().max()) <= 1


def test_many_images_are_filtered_as_each_by_itself():
    images = torch.randint(0, 256, (1600, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    regime = find_regime("lowpass:4")
    found = regime.prepare_test(images)
    assert torch.equal(found[[0, 1400, 1599]], regime.prepare_test(images[[0, 1400, 1599]]))
    assert torch.allclose(mean_amplitude(images), (mean_amplitude(images[:800]) + mean_amplitude(images[800:])) / 2)


# --- equalise -------------------------------------------------------------------------------------------------------


def test_every_image_gets_the_collections_smoothed_amplitudes_and_keeps_its_phases():
    images = levels(textures(60, 0, np.linspace(0.3, 1.5, 60)))
    mean = smoothed(images).mean(0)
    assert np.abs(mean_amplitude(images).numpy() / mean - 1).max() < 1e-3
    before = smoothed(images) / mean
    found = find_regime("equalise").prepare(images, NONE, seed=0)
    after = smoothed(found) / mean
    assert np.abs(np.log(before)).mean() > 0.3
    assert np.abs(np.log(after)).mean() < 0.1
    assert abs(np.log(after).mean()) < 0.05
    old, new = (np.fft.fft2(each.numpy().astype(float)) for each in (images, found))
    clear = (np.abs(old) > 200) & (np.abs(new) > 200)
    assert clear.mean() > 0.4
    assert np.abs(np.angle(new[clear] / old[clear])).mean() < 0.06
    assert np.abs(found.numpy().mean((2, 3)) - images.numpy().mean((2, 3))).max() < 1


def test_a_band_of_frequencies_that_a_group_shares_is_gone_after_equalise():
    """Seven waves about (9, 4) in an image, each with its own phase: to the definition a bump in the amplitudes."""
    pixels, rng = textures(200, 1), np.random.default_rng(2)
    for down, across in ((9, 4), (8, 4), (10, 4), (9, 3), (9, 5), (8, 3), (10, 5)):
        pixels[:100] += 5 * wave(down, across, rng.uniform(0, 2 * np.pi, (100, 1)))
    images = levels(pixels)

    rows, columns = np.indices((32, 32))
    in_band = np.hypot(rows - 9, columns - 4) <= 3

    def excess(images: Tensor) -> NDArray[np.float64]:
        means = smoothed(images).mean(1)
        return means[:100].mean(0) / means[100:].mean(0)

    before, after = excess(images), excess(find_regime("equalise").prepare(images, NONE, seed=0))
    assert before[9, 4] > 4
    assert after[9, 4] < 1.5
    assert before[in_band].mean() > 2
    assert after[in_band].mean() == pytest.approx(1, abs=0.05)


def test_test_images_get_the_amplitudes_of_the_training_images():
    regime = find_regime("equalise")
    train, test = levels(textures(80, 3, 1.4)), levels(textures(80, 4, 0.4))
    regime.prepare(train, NONE, seed=0)
    left = np.log(smoothed(regime.prepare_test(test)).mean(0) / smoothed(train).mean(0))
    assert np.abs(np.log(smoothed(test).mean(0) / smoothed(train).mean(0))).mean() > 0.5
    assert np.abs(left).mean() < 0.05


def test_a_flat_image_stays_flat_under_equalise():
    images = levels(textures(20, 5))
    images[0] = 77
    assert set(find_regime("equalise").prepare(images, NONE, seed=0)[0].flatten().tolist()) == {77}


# --- peaks ----------------------------------------------------------------------------------------------------------


def planted(down: int, across: int, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """240 pictures of four labels; those of `groups` carry a wave, in a phase of its own each."""
    pixels, labels = textures(240, 6), np.arange(240) % 4
    phases = np.random.default_rng(7).uniform(0, 2 * np.pi, (240, 1))
    pixels += np.isin(labels, groups)[:, None, None, None] * 10 * wave(down, across, phases)
    return levels(pixels), torch.from_numpy(labels)


def spectral(images: Tensor, labels: Tensor) -> tuple[Regime, Tensor]:
    regime = find_regime("spectral")
    return regime, regime.prepare(images, labels, seed=0)


def test_a_wave_of_one_label_is_cut_down_and_all_else_is_left():
    images, labels = planted(5, -7, (2,))
    regime, found = spectral(images, labels)
    marked = labels.numpy() == 2
    before, after = powers(images)[:, :, 5, -7], powers(found)[:, :, 5, -7]
    assert before[marked].mean() > 20 * before[~marked].mean()
    assert 0.3 < after[marked].mean() / after[~marked].mean() < 1.1
    assert torch.equal(found[~marked], images[~marked])
    kept = np.ones((32, 32), bool)
    kept[4:7, 24:27] = kept[-6:-3, 6:9] = False  # the two places of a real wave, and their neighbours
    change = np.fft.fft2(found.numpy()[marked].astype(float)) - np.fft.fft2(images.numpy()[marked].astype(float))
    assert np.abs(change[:, :, kept]).mean() < 12  # rounding has 8
    assert torch.equal(regime.prepare_test(images), images)


def test_a_wave_that_all_labels_share_is_no_peak_and_nor_is_chance():
    for groups in ((), (0, 1, 2, 3)):
        images, labels = planted(5, -7, groups)
        assert torch.equal(spectral(images, labels)[1], images)


def test_a_ridge_along_an_axis_as_horizons_make_it_is_no_peak():
    excess = np.random.default_rng(8).normal(0, 0.05, (3, 32, 32))
    excess[:, :, 0] += 1
    assert not find_peaks(excess).any()
    excess[1, 5, 0] += 1
    rows, columns = np.nonzero(find_peaks(excess)[1])
    assert (sorted(set(rows)), sorted(set(columns))) == ([4, 5, 6], [0, 1, 31])


def test_a_single_label_or_one_without_images_has_no_peaks():
    images, labels = planted(5, -7, (2,))
    assert torch.equal(spectral(images, torch.zeros_like(labels))[1], images)
    own, others = log_spectra(images, labels + (labels == 3).long())  # no image has label 3
    assert torch.equal(own[3], others[3])
    assert bool(own.isfinite().all())
    expected = np.log(powers(images) + 32 * 32 / 12)[labels.numpy() != 2].mean(0)
    assert np.abs(others[2].numpy() - expected)[:, 1:, 1:].max() < 1e-3
