"""The denoiser takes off what it was shown, says how much, and is the same every time; noise keeps its bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.relearning.denoisers.denoiser import (
    Denoiser,
    DenoiserRecipe,
    UNet,
    denoise,
    denoiser_from_bytes,
    gain_db,
    train_denoiser,
)
from pipeline.relearning.denoisers.noises import FAMILIES, draw_noise

CPU = torch.device("cpu")
QUICK = DenoiserRecipe(width=16, batch_size=16, rates=(3e-3, 6e-4), max_steps=160, every=20)


def grainy(count: int, seed: int, side: int = 16) -> Tensor:
    """Grey pictures under fine grain: nothing in them is as smooth as the delta."""
    rng = np.random.default_rng(seed)
    pixels = 128 + rng.choice([-30, 30], (count, 3, side, side)) + rng.integers(-40, 40, (count, 3, 1, 1))
    return torch.from_numpy(pixels.astype(np.uint8))


def shading(side: int = 16) -> Tensor:
    """One fixed delta of low frequency, 16 levels from its edges to its middle: int16 [3, side, side]."""
    wave = torch.sin(math.pi * (torch.arange(side) + 0.5) / side)
    return (16 * (wave[:, None] * wave[None, :] * 2 - 1)).round().short().expand(3, side, side)


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    clean = grainy(count, seed)
    return clean, (clean.short() + shading()).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def trained() -> Denoiser:
    return train_denoiser(*pairs(64, seed=0), seed=0, recipe=QUICK, digest="d")


def test_a_fixed_delta_of_low_frequency_is_taken_off_pictures_that_were_never_seen(trained):
    clean, protected = pairs(32, seed=9)
    cleaned = denoise(trained.network(CPU), protected)
    assert gain_db(protected, cleaned, clean) > 10
    assert trained.gain_db == pytest.approx(gain_db(protected, cleaned, clean), abs=3)


def test_the_gain_is_ten_times_the_logarithm_of_the_ratio_of_square_errors():
    clean = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert gain_db(clean + 10, clean + 1, clean) == pytest.approx(20)
    assert gain_db(clean + 1, clean - 10, clean) == pytest.approx(-20)
    assert gain_db(clean + 10, clean, clean) == 99
    assert gain_db(clean, clean + 1, clean) == -99
    assert gain_db(clean, clean, clean) == 0


def test_the_network_has_at_least_half_a_million_parameters_and_starts_as_the_identity():
    network = UNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 869_372
    images = grainy(3, 0)
    assert torch.equal(denoise(network.eval(), images), images)


def test_equal_arguments_give_equal_bytes_and_another_seed_others(trained):
    short = replace(QUICK, max_steps=40)
    first, again, other = (
        train_denoiser(*pairs(24, seed=0), seed=seed, recipe=short, digest="d").to_bytes() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    back = denoiser_from_bytes(trained.to_bytes(), "here")
    assert back.to_bytes() == trained.to_bytes()
    assert (back.digest, back.width, back.num_steps) == ("d", 16, trained.num_steps)


def test_a_damaged_file_is_named(trained):
    with pytest.raises(InputError, match="out/x: not a denoiser, or truncated; delete it and it will be trained again"):
        denoiser_from_bytes(trained.to_bytes()[:500], "out/x")


def test_training_ends_when_the_gain_is_flat_and_what_it_gives_does_no_harm():
    clean = grainy(24, seed=0)
    idle = DenoiserRecipe(width=8, batch_size=4, rates=(1e-3, 1e-4), max_steps=400, every=5, patience=3)
    nothing = train_denoiser(clean, clean, seed=0, recipe=idle)
    assert nothing.num_steps == 2 * 3 * 5
    assert nothing.gain_db == 0
    assert torch.equal(denoise(nothing.network(CPU), clean), clean)


def test_what_does_not_learn_keeps_the_identity():
    wild = DenoiserRecipe(width=8, batch_size=4, rates=(1e3,), max_steps=20, every=10)
    spoilt = train_denoiser(*pairs(16, seed=0), seed=0, recipe=wild)
    assert spoilt.gain_db == 0
    assert torch.equal(denoise(spoilt.network(CPU), grainy(2, 1)), grainy(2, 1))


def test_a_denoiser_without_pairs_learns_noise_and_leaves_half_of_it_at_most():
    smooth = F.interpolate(grainy(48, 0, side=3).float(), size=16, mode="bilinear").to(torch.uint8)
    found = train_denoiser(smooth, None, seed=0, recipe=replace(QUICK, max_steps=120))
    assert found.gain_db > 3


@pytest.mark.parametrize("side", [17, 30])
def test_any_side_is_cleaned_and_trained_on(side):
    recipe = replace(QUICK, width=8, max_steps=40, every=20)
    clean = grainy(8, 0, side=side)
    found = train_denoiser(clean, clean - 9, seed=0, recipe=recipe)
    assert denoise(found.network(CPU), clean).shape == clean.shape


def test_one_picture_is_not_enough():
    with pytest.raises(InputError, match="takes at least 2 pictures; there are 1"):
        train_denoiser(*pairs(1, seed=0), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_noise_stays_within_one_and_is_drawn_anew(family):
    rng = torch.Generator().manual_seed(0)
    first, second = (FAMILIES[family](5, 24, rng) for _ in range(2))
    assert first.shape == (5, 3, 24, 24)
    assert float(first.abs().max()) <= 1
    assert float(first.abs().mean()) > 0.2
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_noise_keeps_epsilon_and_is_of_all_families_grey_and_coloured():
    noise = draw_noise(400, 16, 16 / 255, torch.Generator().manual_seed(0))
    assert float(noise.abs().max()) <= 16 / 255 + 1e-7
    grey = (noise[:, 0] == noise[:, 1]).flatten(1).all(1).float().mean()
    assert float(grey) == pytest.approx(0.5, abs=0.1)
    signs = (noise.abs() == noise.abs().amax((1, 2, 3), keepdim=True)).flatten(1).float().mean(1)
    assert 0.2 < float((signs == 1).float().mean()) < 0.5  # blocks and pixel signs: two of six families
    again = draw_noise(400, 16, 16 / 255, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)
