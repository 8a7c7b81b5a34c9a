"""A delta meets an image in one place, and never by more than epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deltas.delta import LaidDelta, lay, levels_of, perturb, quantise
from pipeline.errors import PromiseError, SettingsError
from tests.support.samples import noise

EPSILON = 16 / 255


def random_levels(side: int, bound: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-bound, bound + 1, (3, side, side)).astype(np.int8)


@pytest.mark.parametrize(
    ("epsilon", "levels"), [(16 / 255, 16), (8 / 255, 8), (0.05, 12), (1 / 255, 1), (0.1, 25), (127 / 255, 127)]
)
def test_levels_are_the_whole_8_bit_steps_inside_the_bound(epsilon: float, levels: int) -> None:
    assert levels_of(epsilon) == levels


def test_more_than_127_levels_are_refused() -> None:
    for epsilon in (128 / 255, 254 / 255, 256 / 255, 16):
        with pytest.raises(SettingsError, match="use 127/255 or less"):
            levels_of(epsilon)


def test_only_an_epsilon_of_one_means_that_nothing_but_the_range_of_pixels_limits_a_delta() -> None:
    assert levels_of(1.0) == 255
    opposite = LaidDelta(np.full((1, 2, 3), -255, np.int16))
    after, largest = opposite.added_to(np.array([[[255, 255, 255], [9, 0, 255]]], np.uint8), 1.0)
    assert (after == 0).all()
    assert largest == 255


def test_levels_are_rounded_half_to_even_and_clipped() -> None:
    delta = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 15.9, 40, -40], np.float32) / np.float32(255)
    exact = delta * np.float32(255)
    assert (exact[:5] == [0.5, 1.5, 2.5, -0.5, -1.5]).all()  # the ties are ties in float32 too
    assert quantise(delta, EPSILON).tolist() == [0, 2, 2, 0, -2, 16, 16, -16]
    assert quantise(torch.from_numpy(delta), EPSILON).tolist() == [0, 2, 2, 0, -2, 16, 16, -16]


def test_a_delta_that_is_not_finite_is_never_quantised() -> None:
    with pytest.raises(PromiseError, match="non-finite"):
        quantise(np.array([np.nan], np.float32), EPSILON)


def test_a_delta_of_the_images_size_is_laid_unchanged() -> None:
    levels = random_levels(9)
    assert (lay(levels, 9, 9, EPSILON) == levels.transpose(1, 2, 0)).all()


def test_doubling_by_hand() -> None:
    levels = np.zeros((3, 2, 2), np.int8)
    levels[0] = [[0, 8], [16, 16]]
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    by_hand = weights @ levels[0] @ weights.T
    assert (lay(levels, 4, 4, EPSILON)[:, :, 0] == np.rint(by_hand)).all()


@pytest.mark.parametrize("size", [(48, 48), (375, 500), (333, 64), (33, 1000), (32, 33)])
def test_enlarging_is_torch_bilinear(size: tuple[int, int]) -> None:
    levels = random_levels(32)
    planes = torch.from_numpy(levels.astype(np.float64))[None]
    exact = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)[0].numpy().transpose(1, 2, 0)
    laid = lay(levels, *size, EPSILON)
    assert np.abs(laid - exact).max() <= 0.5 + 1e-4  # the nearest whole level
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert ((laid == np.rint(exact)) | tie).all()


@pytest.mark.parametrize("size", [(16, 16), (7, 100), (100, 7), (1, 1), (3, 2000)])
def test_shrinking_is_torch_bilinear_with_antialias(size: tuple[int, int]) -> None:
    levels = random_levels(32)
    planes = torch.from_numpy(levels.astype(np.float32))[None]
    exact = F.interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)
    assert (lay(levels, *size, EPSILON) == exact[0].round().numpy().transpose(1, 2, 0)).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 127), st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_no_size_makes_a_laid_delta_leave_the_bound(h: int, w: int, side: int, bound: int, seed: int) -> None:
    signs = np.random.default_rng(seed).integers(0, 2, (3, side, side)) * 2 - 1
    laid = lay((signs * bound).astype(np.int8), h, w, bound / 255)
    assert laid.shape == (h, w, 3)
    assert laid.dtype == np.int16
    assert np.abs(laid).max() <= bound


def test_laying_levels_beyond_the_bound_is_refused() -> None:
    with pytest.raises(PromiseError, match="exceeds the bound of 8 levels"):
        lay(random_levels(8), 16, 16, 8 / 255)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4]), st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_every_pixel_stays_within_epsilon_and_alpha_as_it_was(h: int, w: int, channels: int, seed: int) -> None:
    before = noise(h, w, channels, seed)
    laid = lay(random_levels(24, seed=seed), h, w, EPSILON)
    after, largest = LaidDelta(laid).added_to(before, EPSILON)
    wide = before.astype(float)
    if channels <= 2:
        change = np.round(laid.astype(float).mean(axis=2, keepdims=True))
        expected = np.concatenate([np.clip(wide[:, :, :1] + change, 0, 255), wide[:, :, 1:]], axis=2)
    else:
        expected = np.concatenate([np.clip(wide[:, :, :3] + laid, 0, 255), wide[:, :, 3:]], axis=2)
    assert after.dtype == np.uint8
    assert (after == expected).all()
    assert largest == np.abs(after.astype(int) - before).max() <= 16


def test_values_stop_at_black_and_white() -> None:
    before = np.array([[[0, 255, 250]]], np.uint8)
    laid = np.array([[[-16, 16, 16]]], np.int16)
    assert LaidDelta(laid).added_to(before, EPSILON)[0].tolist() == [[[0, 255, 255]]]


def test_a_broken_bound_names_pixel_value_and_bound() -> None:
    laid = np.zeros((4, 5, 3), np.int16)
    laid[2, 3, 1] = -17
    with pytest.raises(PromiseError) as error:
        LaidDelta(laid).added_to(np.full((4, 5, 3), 100, np.uint8), EPSILON)
    assert str(error.value) == "pixel (row 2, column 3, channel 1) would change by 17 levels; the bound is 16"


@pytest.mark.parametrize("shape", [(4, 4, 1), (1, 1, 3), (4, 5, 3), (3, 4, 4)])
def test_a_delta_of_another_shape_is_never_broadcast(shape: tuple[int, int, int]) -> None:
    with pytest.raises(PromiseError, match=r"does not fit|is not \[H, W, 3\]"):
        LaidDelta(np.zeros(shape, np.int16)).added_to(noise(4, 4), EPSILON)
    with pytest.raises(PromiseError, match="does not fit"):
        LaidDelta(np.zeros((4, 4, 3), np.int16)).added_to(np.zeros((4, 4, 5), np.uint8), EPSILON)


@pytest.mark.parametrize("bound", [1, 16, 127])
def test_the_sum_is_clipped_for_every_pixel_value_and_level(bound: int) -> None:
    values, levels = np.arange(256), np.arange(-bound, bound + 1)
    pixels = np.broadcast_to(values[:, None, None], (256, len(levels), 3)).astype(np.uint8)
    laid = np.broadcast_to(levels[None, :, None], pixels.shape).astype(np.int16)
    delta = LaidDelta(laid)
    after, largest = delta.added_to(pixels, bound / 255)
    assert (after == np.clip(values[:, None, None] + levels[None, :, None], 0, 255)).all()
    assert largest == bound
    assert (delta.levels == laid).all()
    assert (pixels == values[:, None, None]).all()


def test_turned_views_and_read_only_pixels_get_their_delta_too() -> None:
    before, laid = noise(7, 9), lay(random_levels(8), 9, 7, EPSILON)
    turned = before[::-1].swapaxes(0, 1)
    turned.flags.writeable = False
    after, _ = LaidDelta(laid).added_to(turned, EPSILON)
    assert (after == np.clip(turned.astype(int) + laid, 0, 255)).all()


def test_more_levels_than_a_byte_holds_are_refused() -> None:
    with pytest.raises(PromiseError, match="more than 255"):
        LaidDelta(np.full((4, 5, 3), 256, np.int16))


def test_perturbed_images_are_clamped_and_carry_gradients() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    delta = torch.tensor([-0.1, 0.1, 0.1]).reshape(3, 1, 1).requires_grad_()
    result = perturb(images, delta)
    assert result.flatten().tolist() == pytest.approx([0.0, 0.6, 1.0])
    result.sum().backward()
    assert delta.grad is not None
    assert delta.grad.flatten().tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(PromiseError, match="does not fit"):
        perturb(images, torch.zeros(3, 2, 1))
