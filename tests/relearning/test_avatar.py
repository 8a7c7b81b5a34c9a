"""AVATAR and LE: their noise is DDPM's, its steps sample as theory says, and its network learns what noise is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.relearning.denoisers.denoiser import DenoiserRecipe
from pipeline.relearning.denoisers.diffusion import (
    AVATAR_SCHEDULE,
    LARGEST,
    LE_SCHEDULE,
    NoiseSchedule,
    regenerated,
    size_maps,
    train_diffusion,
)
from pipeline.relearning.denoisers.pairs import denoiser_digest
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.regimes.base import Knowledge
from tests.relearning.regimes.test_regimes import pictures

BRIEF = DenoiserRecipe(width=16, rates=(2e-3,), max_steps=200, every=100)


@pytest.mark.parametrize(("schedule", "steps"), [(AVATAR_SCHEDULE, 100), (LE_SCHEDULE, 20)])
def test_the_noise_is_what_these_steps_of_ddpm_leave(schedule: NoiseSchedule, steps: int) -> None:
    kept = np.prod(
        1 - np.linspace(1e-4, 0.02, 1000)[:steps]
    )  # of the picture's energy; Ho et al. 2020, linear schedule
    size = np.sqrt((1 - kept) / kept) / 2  # it works in -1 ... 1
    assert schedule.size == pytest.approx(size, rel=0.02)


class Ideal(nn.Module):
    """The exact expectation of the noise in pictures whose pixels are independent, normal, of a known deviation."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, images: Tensor, maps: Tensor) -> Tensor:
        energy = (maps[:, :1] * LARGEST) ** 2
        return (images - 0.5) * energy / (self.deviation**2 + energy)


@pytest.mark.parametrize("deviation", [0.05, 0.1])
def test_with_an_ideal_network_it_draws_from_what_the_picture_may_have_been(deviation: float) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(127.5, 255 * deviation, (60, 3, 32, 32))
    images = torch.from_numpy(drawn.round().clip(0, 255).astype(np.uint8))
    made = regenerated(Ideal(deviation), images, AVATAR_SCHEDULE, seed=0)  # type: ignore[arg-type]
    before, after = images.numpy().ravel() / 255 - 0.5, made.numpy().ravel() / 255 - 0.5
    assert after.std() == pytest.approx(deviation, rel=0.06)  # fifty steps, not infinitely many
    # cov(x, x') = var E[x | noised x] = d^4 / (d^2 + s^2)
    expected = deviation**2 / (deviation**2 + LARGEST**2)
    assert np.corrcoef(before, after)[0, 1] == pytest.approx(expected, abs=0.02)
    assert torch.equal(made, regenerated(Ideal(deviation), images, AVATAR_SCHEDULE, seed=0))  # type: ignore[arg-type]
    assert not torch.equal(made, regenerated(Ideal(deviation), images, AVATAR_SCHEDULE, seed=1))  # type: ignore[arg-type]


def test_a_network_learns_the_noise_and_brings_back_pictures_without_a_delta() -> None:
    trained = train_diffusion(pictures(200, seed=1), seed=0, recipe=BRIEF)
    assert trained.gain_db > 4
    clean = pictures(40, seed=2)
    stripes = 16 * torch.tensor([-1, 1]).repeat(16)
    protected = (clean.short() + stripes.short()).clamp(0, 255).to(torch.uint8)
    made = regenerated(trained.network(torch.device("cpu")), protected, AVATAR_SCHEDULE, seed=0)

    def along(images: Tensor) -> float:
        return float(((images.float() - clean.float()) * stripes).mean() / 256)

    assert along(protected) > 0.9
    assert along(made) < 0.3
    assert torch.equal(made, regenerated(trained.network(torch.device("cpu")), protected, AVATAR_SCHEDULE, seed=0))
    again = train_diffusion(pictures(200, seed=1), seed=0, recipe=BRIEF)
    assert again.to_bytes() == trained.to_bytes()


@pytest.mark.parametrize("name", ["avatar", "le"])
def test_training_images_alone_are_made_again_at_any_side(name: str) -> None:
    trained = train_diffusion(pictures(8, seed=1), seed=0, recipe=DenoiserRecipe(width=8, max_steps=2, every=1))
    regime = find_regime(name, Knowledge(denoisers={"avatar": trained}))
    odd = pictures(3, seed=3)[:, :, :, :27]
    made = regime.prepare(odd, torch.zeros(3, dtype=torch.long), seed=0)
    assert (made.shape, made.dtype) == (odd.shape, torch.uint8)
    assert not torch.equal(made, odd)
    assert torch.equal(regime.prepare_test(odd), odd)


def test_it_needs_pictures_and_is_not_taken_for_another_denoiser() -> None:
    with pytest.raises(InputError, match="at least 2 pictures; there are 1"):
        train_diffusion(pictures(1, seed=0), seed=0)
    clean = pictures(4, seed=0).numpy()
    assert denoiser_digest(clean, None, BRIEF, 0) != denoiser_digest(clean, None, BRIEF, 0, "diffusion")
    maps = size_maps(torch.tensor([LARGEST, LARGEST / 4]), (2, 3, 8, 16))
    assert maps.shape == (2, 2, 8, 16)
    assert maps[:, :, 0, 0].flatten().tolist() == pytest.approx([1, 1, 0.25, 0.5])
