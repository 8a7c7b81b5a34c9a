"""Defences against poisons and filters: as SciPy filters, noise by its recursion, medoids by exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import correlate, map_coordinates
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.hashing import torch_rng
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.regimes.recovery.epic import choose_medoids, is_isolated, score_gradients
from pipeline.relearning.regimes.recovery.friendly import (
    BOUND,
    DROPS,
    LR,
    MOMENTUM,
    START,
    STEPS,
    FriendlyNoise,
    friendly_noise,
)
from pipeline.relearning.regimes.views.interpolate import REACH, resampled
from pipeline.relearning.regimes.views.sharpen import low_frequencies, sharpened, sharpening_kernels
from pipeline.relearning.training import Recipe, Regime, Training
from tests.support.samples import stripes


class Linear(nn.Module):
    """Class scores that are linear in the pixels."""

    def __init__(self, scale: float, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 32 * 32, classes)
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(images.flatten(1))
        return scores


def training(regime: Regime | None = None, *, scale: float = 1.0, count: int = 40, epochs: int = 16) -> Training:
    images, labels = stripes(count, 0)
    recipe = Recipe(epochs=epochs, normalise="none", batch_size=16)
    return Training(Linear(scale), images, labels, regime or Regime(), recipe, 0, torch.device("cpu"))


# --- coin ----------------------------------------------------------------------------------------------------------


def test_pixels_are_resampled_as_scipy_does_it() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((2, 3, 9, 14), np.float32)
    offsets = rng.uniform(-3, 3, (2, 2, 9, 14)).astype(np.float32)
    found = resampled(torch.from_numpy(images), torch.from_numpy(offsets)).numpy()
    for image, (down, across), ours in zip(images, offsets, found, strict=True):
        rows, columns = np.indices((9, 14)) + np.stack([down, across])
        for channel, mine in zip(image, ours, strict=True):
            theirs = map_coordinates(channel, [rows, columns], order=1, mode="grid-wrap")
            assert np.abs(mine - theirs).max() < 1e-5


def test_coin_moves_every_pixel_on_its_own_by_up_to_two_pixels_and_all_channels_alike() -> None:
    ramps = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")) / 64
    images = torch.cat([ramps, ramps[:1]])[None].repeat(5, 1, 1, 1)
    seen = find_regime("coin").batch(images, torch.Generator().manual_seed(0))
    moved = 64 * (seen - images)[..., 2:-3, 2:-3]  # further out, a ramp starts anew
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert moved.abs().max() <= REACH + 1e-3
    assert moved[:, :2].std() == pytest.approx(REACH / 3**0.5, rel=0.02)
    assert abs(np.corrcoef(moved[:, 0].flatten(), moved[:, 1].flatten())[0, 1]) < 0.03
    assert abs(np.corrcoef(moved[:, 0, :, :-1].flatten(), moved[:, 0, :, 1:].flatten())[0, 1]) < 0.03


# --- rsk-ff --------------------------------------------------------------------------------------------------------


def test_kernels_leave_a_flat_image_as_it_is_on_average_and_vary_by_a_tenth() -> None:
    kernels = sharpening_kernels(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(kernels[:, [0, 0, 2, 2], [0, 2, 0, 2]], torch.zeros(20_000, 4))
    assert kernels[:, 1, 1].mean() == pytest.approx(2.5, abs=0.005)
    assert kernels[:, 1, 1].std() == pytest.approx(0.1, rel=0.03)
    assert kernels[:, [0, 1, 1, 2], [1, 0, 2, 1]].mean() == pytest.approx(-1.5 / 4, abs=0.005)
    sums = kernels.sum((1, 2))
    assert (float(sums.mean()), float(sums.std())) == (pytest.approx(1, abs=0.005), pytest.approx(0.2, rel=0.03))


def test_images_are_sharpened_and_filtered_as_scipy_does_it() -> None:
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 20, 32), np.float32))
    kernels = sharpening_kernels(2, torch.Generator().manual_seed(0))
    for image, kernel, ours in zip(images, kernels, sharpened(images, kernels), strict=True):
        theirs = np.stack([correlate(channel, kernel.numpy(), mode="mirror") for channel in image.numpy()])
        assert np.abs(ours.numpy() - theirs).max() < 1e-5
    spectra = dctn(images.numpy(), axes=(2, 3), norm="ortho")
    spectra[:, :, 6:], spectra[..., 9:] = 0, 0  # 30 % of 20 and of 32
    assert np.abs(low_frequencies(images, 0.3).numpy() - idctn(spectra, axes=(2, 3), norm="ortho")).max() < 1e-5


# --- friendly noise ------------------------------------------------------------------------------------------------


def test_noise_that_changes_no_answer_grows_by_gradient_ascent_on_its_mean_square() -> None:
    here = training(scale=0.0)
    found = friendly_noise(here)
    noise = start_of(here).numpy().astype(np.float64)
    velocity = np.zeros_like(noise)
    for step in range(STEPS):  # SGD with Nesterov's momentum, as its definition has it
        gradient = -2 * noise / noise.size
        velocity = MOMENTUM * velocity + gradient
        noise -= LR * 0.1 ** sum(step >= drop for drop in DROPS) * (gradient + MOMENTUM * velocity)
    assert np.abs(noise).max() > START
    assert np.abs(found.numpy() - np.clip(noise, -BOUND, BOUND) * 255).max() <= 0.5 + 1e-3


def test_noise_keeps_within_its_bound_and_answers_nearer_to_what_they_were() -> None:
    here = training(scale=2.0)
    found = friendly_noise(here)
    assert found.dtype == torch.int8
    assert found.abs().max() <= 16
    assert harm(here, found / 255) < 0.5 * harm(here, start_of(here))


def start_of(here: Training) -> Tensor:
    """The noise before its first step, from the draws that the paper's code has."""
    rng = torch_rng(here.seed, "friendly-noise", 0)
    return (2 * torch.rand(here.images.shape, generator=rng) - 1) * START


@torch.no_grad()
def harm(here: Training, noise: Tensor) -> float:
    images = here.images / 255
    before, after = (F.log_softmax(here.scores(x), 1) for x in (images, (images + noise).clamp(0, 1)))
    return float((before.exp() * (before - after)).sum(1).mean())


def test_the_noise_is_added_once_after_an_eighth_of_the_epochs() -> None:
    regime = FriendlyNoise()
    here = training(regime, epochs=16)
    original = here.images.clone()
    for epoch in (0, 1):
        regime.begin_epoch(here, epoch)
        assert torch.equal(here.images, original)
    assert regime.state() == {}
    regime.begin_epoch(here, 2)
    noisy = here.images.clone()
    assert 0 < (noisy.short() - original.short()).abs().max() <= 16
    regime.begin_epoch(here, 3)
    assert torch.equal(here.images, noisy)


def test_every_value_of_a_batch_is_changed_by_eight_levels() -> None:
    images = torch.full((50, 3, 32, 32), 0.5)
    changes = 255 * (FriendlyNoise().batch(images, torch.Generator().manual_seed(0)) - images)
    assert torch.allclose(changes.abs(), torch.tensor(8.0), atol=1e-3)
    assert abs(float(changes.mean())) < 0.1


# --- EPIC ----------------------------------------------------------------------------------------------------------


def test_the_gradient_by_the_scores_is_that_of_autograd() -> None:
    here = training(scale=5.0)
    scores = here.scores(here.images.float() / 255).detach().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(scores, here.labels, reduction="sum"), scores)
    assert np.allclose(score_gradients(here), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_chooses_what_trying_every_point_chooses(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(60, 3)).astype(np.float32)
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    chosen: list[int] = []
    for _ in range(12):
        sums = {
            point: distances[:, [*chosen, point]].min(1).sum() for point in range(len(points)) if point not in chosen
        }
        chosen.append(min(sums, key=lambda point: sums[point]))
    assert choose_medoids(distances, 12) == chosen


def test_a_point_far_from_all_others_of_its_label_is_isolated_and_twins_are_not() -> None:
    near = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32) * 0.01
    points = np.concatenate([near[:18], near[18:38] + 5, near[38:39] + 100, near[39:40] - 100])
    labels = np.array([0] * 19 + [1] * 19 + [0, 1])
    found = is_isolated(points, labels, share=0.15)  # three medoids of a label's twenty points
    assert np.flatnonzero(found).tolist()[-2:] == [38, 39]
    assert not is_isolated(np.zeros((20, 2), np.float32), np.zeros(20, np.int64)).any()


def test_isolated_images_leave_with_their_labels_and_do_not_return() -> None:
    regime = find_regime("epic")
    here = training(regime, count=80, epochs=8)
    wrong = torch.arange(0, 80, 20)
    here.labels[wrong] = (here.labels[wrong] + 1) % 4
    for epoch in range(3):
        here.run_epoch(epoch)
    original, labels = here.images.clone(), here.labels.clone()
    stay = torch.from_numpy(~is_isolated(score_gradients(here), labels.numpy()))
    assert set(wrong.tolist()) & set((~stay).nonzero().flatten().tolist())
    regime.begin_epoch(here, 0)
    assert len(here.images) == 80
    regime.begin_epoch(here, 1)
    assert torch.equal(here.images, original[stay])
    assert torch.equal(here.labels, labels[stay])
    assert here.num_batches == stay.sum() // 16
    regime.begin_epoch(here, 2)
    (kept,) = regime.state().values()
    assert set(kept.tolist()) <= set(stay.nonzero().flatten().tolist())
    assert torch.equal(here.images, original[kept])
    assert torch.equal(here.rows, kept)
    regime.begin_epoch(here, 8)  # the last eighth
    assert len(here.images) == len(kept)


def test_the_learning_rate_follows_the_epochs_however_many_images_are_left() -> None:
    here = training(epochs=4)
    here.run_epoch(0)
    here.keep(torch.arange(20))
    assert (here.num_batches, here.batch_size) == (1, 16)
    here.run_epoch(1)
    assert {group["lr"] for group in here.optimiser.param_groups} == {here.recipe.rate(1, 4)}
