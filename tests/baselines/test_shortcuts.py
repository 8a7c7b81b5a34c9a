"""Published protections that need no network, each held against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pipeline.baselines.base import BaselineSettings, LabelledPictures
from pipeline.baselines.methods import BASELINES, baseline
from pipeline.baselines.shortcuts.separable import patch_of, separable_patterns

CLASSES = 4


def pictures(count: int = 48, side: int = 32, seed: int = 0) -> LabelledPictures:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, side, side)).astype(np.uint8)
    return LabelledPictures(
        images, np.arange(count, dtype=np.int64) % CLASSES, tuple(f"k{row:03d}" for row in range(count))
    )


def made(name: str, given: LabelledPictures, epsilon: float = 8 / 255, seed: int = 0) -> np.ndarray:
    method = baseline(name)
    return method.deltas(given, BaselineSettings(epsilon if method.bound == "linf" else 1.0, seed), lambda _: None)


@pytest.mark.parametrize("name", BASELINES)
def test_shape_bound_and_draws_are_as_every_baseline_promises(name: str) -> None:
    method, given = baseline(name), pictures()
    deltas = made(name, given)
    assert deltas.dtype == np.int16
    assert deltas.shape == (len(given.keys) if method.per_sample else CLASSES, 3, 32, 32)
    assert np.abs(deltas).max() <= (8 if method.bound == "linf" else 255)
    assert (deltas != 0).any((1, 2, 3)).all()
    assert (made(name, given) == deltas).all()


@pytest.mark.parametrize("name", [name for name in BASELINES if baseline(name).per_sample])
def test_what_is_random_about_a_picture_follows_its_key_not_its_place(name: str) -> None:
    given = pictures()
    order = np.random.default_rng(1).permutation(len(given.keys))
    mixed = LabelledPictures(given.images[order], given.labels[order], tuple(given.keys[row] for row in order))
    assert (made(name, mixed) == made(name, given)[order]).all()


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


def test_a_linear_classifier_learns_sp_alone_from_half_of_it_and_knows_the_other_half() -> None:
    given = pictures(400, side=32)
    flat = made("sp", given).reshape(400, -1)[:, ::8] / 6.0
    fitted = LogisticRegression(max_iter=200).fit(flat[:200], given.labels[:200])
    assert fitted.score(flat[200:], given.labels[200:]) == 1.0
