"""Published protections that need no network, each held against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.ndimage import convolve
from scipy.signal import correlate
from sklearn.linear_model import LogisticRegression

from pipeline.baselines.base import BaselineSettings, LabelledPictures
from pipeline.baselines.methods import BASELINES, baseline
from pipeline.baselines.shortcuts import autoregressive
from pipeline.baselines.shortcuts.autoregressive import ar_filters, ar_kernels, ar_signals
from pipeline.baselines.shortcuts.class_filters import class_filter, filtered
from pipeline.baselines.shortcuts.one_pixel import one_pixel_scores
from pipeline.baselines.shortcuts.separable import patch_of, separable_patterns

CLASSES = 4
SHORTCUTS = [name for name, method in BASELINES.items() if method.place.startswith("shortcuts.")]


def pictures(count: int = 48, side: int = 32, seed: int = 0) -> LabelledPictures:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, side, side)).astype(np.uint8)
    return LabelledPictures(
        images, np.arange(count, dtype=np.int64) % CLASSES, tuple(f"k{row:03d}" for row in range(count))
    )


def made(name: str, given: LabelledPictures, epsilon: float = 8 / 255, seed: int = 0) -> np.ndarray:
    method = baseline(name)
    return method.deltas(given, BaselineSettings(epsilon if method.bound == "linf" else 1.0, seed), lambda _: None)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shape_bound_and_draws_are_as_every_baseline_promises(name: str) -> None:
    method, given = baseline(name), pictures()
    deltas = made(name, given)
    assert deltas.dtype == np.int16
    assert deltas.shape == (len(given.keys) if method.per_sample else CLASSES, 3, 32, 32)
    assert np.abs(deltas).max() <= (8 if method.bound == "linf" else 255)
    assert (deltas != 0).any((1, 2, 3)).all()
    assert (made(name, given) == deltas).all()


@pytest.mark.parametrize("name", [name for name in SHORTCUTS if baseline(name).per_sample])
def test_what_is_random_about_a_picture_follows_its_key_not_its_place(name: str) -> None:
    given = pictures()
    order = np.random.default_rng(1).permutation(len(given.keys))
    mixed = LabelledPictures(given.images[order], given.labels[order], tuple(given.keys[row] for row in order))
    assert (made(name, mixed) == made(name, given)[order]).all()


def test_autoregressive_noise_on_large_pictures_is_cut_where_no_picture_could_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing = np.zeros((CLASSES, 3, 3, 3))
    growing[..., 0, 1] = growing[..., 1, 0] = 30.0  # all of it ends in one corner
    monkeypatch.setattr(autoregressive, "ar_kernels", lambda count, seed: growing)
    deltas = made("ar", pictures(count=4, side=96))
    assert np.abs(deltas).max() == 255


def test_class_noise_is_uniform_over_all_levels_of_the_ball_and_differs_by_class_and_seed() -> None:
    noise = made("random", pictures(side=64))
    counts = np.bincount((noise + 8).ravel(), minlength=17)
    assert len(counts) == 17
    assert np.abs(counts / noise.size - 1 / 17).max() < 0.004
    assert all((noise[first] != noise[second]).mean() > 0.9 for first in range(4) for second in range(first))
    assert (made("random", pictures(side=64), seed=1) != noise).mean() > 0.9


@pytest.mark.parametrize(("side", "block"), [(32, 8), (64, 16), (36, 9), (20, 5)])
def test_class_blocks_have_the_bound_everywhere_and_one_sign_in_a_block(side: int, block: int) -> None:
    blocks = made("block", pictures(side=side))
    assert set(np.unique(blocks)) == {-8, 8}
    cut = blocks.reshape(CLASSES, 3, side // block, block, side // block, block)
    assert (cut == cut[:, :, :, :1, :, :1]).all()


def test_sp_has_the_published_norm_and_patches() -> None:
    assert [patch_of(side) for side in (32, 64, 96, 128, 224)] == [8, 16, 24, 32, 32]
    for side in (32, 36, 50):
        given = pictures(side=side)
        patch = patch_of(side)
        whole = separable_patterns(given, 0).repeat(patch, 2).repeat(patch, 3)[:, :, :side, :side]
        norms = np.sqrt((whole**2).sum((1, 2, 3))) / 255
        assert norms == pytest.approx(math.sqrt(3 * side * side) * 6 / 255, rel=1e-12)
        assert (made("sp", given) == np.floor(whole)).all()
    assert norms[0] * 32 / side == pytest.approx(1.304, abs=1e-3)


def test_sp_takes_labels_as_they_are_spread() -> None:
    few = pictures(41)
    labels = np.repeat([0, 1, 2], [1, 33, 7])
    patterns = separable_patterns(LabelledPictures(few.images, labels, few.keys), 0)
    assert len({pattern.tobytes() for pattern in patterns}) == 41
    assert np.isfinite(patterns).all()
    means = [patterns[labels == label].mean(0).ravel() for label in range(3)]
    nearest = [int(np.argmin([((pattern.ravel() - mean) ** 2).sum() for mean in means])) for pattern in patterns]
    assert nearest == labels.tolist()


def test_a_linear_classifier_learns_sp_alone_from_half_of_it_and_knows_the_other_half() -> None:
    given = pictures(400, side=32)
    flat = made("sp", given).reshape(400, -1)[:, ::8] / 6.0
    fitted = LogisticRegression(max_iter=200).fit(flat[:200], given.labels[:200])
    assert fitted.score(flat[200:], given.labels[200:]) == 1.0


def test_ops_changes_one_pixel_and_gives_all_pictures_of_a_label_the_same_corner_colour() -> None:
    given = pictures()
    after = given.images.astype(np.int16) + made("ops", given)
    changed = (made("ops", given) != 0).any(1)
    assert (changed.sum((1, 2)) <= 1).all()
    pairs = set()
    for label in range(CLASSES):
        of_label = np.flatnonzero(given.labels == label)
        row, column = np.unravel_index(int(changed[of_label].any(0).argmax()), (32, 32))
        colours = {tuple(colour) for colour in after[of_label, :, row, column].tolist()}
        (colour,) = colours
        assert set(colour) <= {0, 255}
        pairs.add((row, column, colour))
    assert len(pairs) == CLASSES


def test_ops_scores_are_mean_over_deviation_of_the_distance_to_each_corner() -> None:
    images = pictures(9, side=5).images
    scores = one_pixel_scores(images)
    for colour, (row, column) in itertools.product(range(8), [(0, 0), (4, 1), (2, 3)]):
        corner = np.array([colour // 4, colour // 2 % 2, colour % 2])
        distance = np.abs(corner - images[:, :, row, column] / 255)
        assert scores[colour, row, column] == pytest.approx(distance.mean() / distance.std())


def test_ops_uses_no_pair_of_place_and_colour_twice() -> None:
    images = np.full((8, 3, 4, 4), 100, np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]
    images[:, :, 2, 1] = 10 + np.arange(8)[:, None] % 2  # for every label the farthest from white
    given = LabelledPictures(images, np.arange(8) // 2, tuple("abcdefgh"))
    after = images + made("ops", given)
    assert (after[:2, :, 2, 1] == 255).all()
    assert not (after[2:4, :, 2, 1] == 255).all()


def test_ar_follows_its_kernel_in_raster_order() -> None:
    kernel = ar_kernels(1, 0)
    start = np.random.default_rng(0).standard_normal((1, 3, 9, 9))
    wanted = start[0].copy()
    for channel, y, x in itertools.product(range(3), range(2, 9), range(2, 9)):
        window = wanted[channel, y - 2 : y + 1, x - 2 : x + 1]
        wanted[channel, y, x] = sum(window[i, j] * kernel[0, channel, i, j] for i in range(3) for j in range(3))
    assert ar_signals(kernel, start)[0] == pytest.approx(wanted[:, 4:, 4:])


def test_ar_filters_are_silent_on_their_own_noise_and_answer_that_of_others() -> None:
    kernels = ar_kernels(10, 0)
    assert kernels.sum((2, 3)) == pytest.approx(1)
    assert (kernels[..., 2, 2] == 0).all()
    signals = ar_signals(kernels, np.random.default_rng(5).standard_normal((10, 3, 36, 36)))
    signals /= np.sqrt((signals**2).sum((1, 2, 3), keepdims=True))
    answers = np.array(
        [[np.maximum(correlate(signal, each, "valid"), 0).sum() for signal in signals] for each in ar_filters(kernels)]
    )
    assert answers.diagonal() == pytest.approx(0, abs=1e-9)
    assert answers[~np.eye(10, dtype=bool)].min() > 2


@pytest.mark.parametrize(("side", "norm"), [(32, 1), (96, 3)])
def test_ar_has_the_published_norm(side: int, norm: float) -> None:
    norms = np.sqrt((made("ar", pictures(8, side=side)).astype(float) ** 2).sum((1, 2, 3))) / 255
    assert norms == pytest.approx(norm, rel=0.02)  # whole levels


def test_cuda_filters_all_channels_alike_and_scales_to_the_largest_value() -> None:
    given = pictures(8, side=16)
    after = given.images + made("cuda", given)
    for row, label in enumerate(given.labels):
        weights = class_filter(0, int(label), 3, 0.3).astype(float)
        assert sorted(weights.ravel())[-1] == 1
        assert (np.sort(weights.ravel())[:-1] <= 0.3).all()
        # as scipy has it, a filter that is turned is a convolution
        wanted = np.stack([convolve(c / 255, weights[::-1, ::-1], mode="constant") for c in given.images[row]])
        left = 255 * wanted / wanted.max() - after[row]  # truncated, as the authors do
        assert left.min() > -1e-3
        assert left.max() < 1.001
    assert after.max(axis=(1, 2, 3)).tolist() == [255] * 8
    large = class_filter(0, 1, 9, 0.06)
    assert (large.shape, (large == 1).sum(), (large > 0.06).sum()) == ((9, 9), 1, 1)
    assert (filtered(np.zeros((1, 3, 4, 4), np.float32), np.ones((1, 3, 3), np.float32)) == 0).all()
