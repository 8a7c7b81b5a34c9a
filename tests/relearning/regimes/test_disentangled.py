"""D-VAE: its rate and losses by hand, and that it takes off what a class shares and leaves the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from pipeline.relearning.denoisers import disentangle
from pipeline.relearning.denoisers.disentangle import FIRST, SECOND, DisentanglingVAE, loss_of, purified, rate
from pipeline.relearning.regimes import find_regime

SIDE, CLASSES = 16, 4


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Smooth pictures uint8 [n, 3, 16, 16], and their labels."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 2, 2, generator=rng)
    smooth = F.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0.1, 0.9)
    return (255 * smooth).to(torch.uint8), torch.arange(count) % CLASSES


def test_the_rate_is_the_divergence_from_the_standard_normal() -> None:
    mean, log_variance = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    apart = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(rate(mean, log_variance), apart.sum(1).mean())


@pytest.mark.parametrize(("nats", "above"), [(0.4, 1.0), (3.0, 3.0)])
def test_a_rate_below_its_target_costs_nothing(nats: float, above: float) -> None:
    images = torch.full((1, 3, 2, 2), 0.5)
    picture, delta = torch.full_like(images, 0.4), torch.full_like(images, 0.3)
    # (0.4 - 0.5)^2 + (0.7 - 0.5)^2
    expected = 0.01 + 0.04 + FIRST.weight * above
    early = loss_of(picture, delta, torch.tensor(nats), images, FIRST, late=False)
    assert float(early) == pytest.approx(expected)
    late = loss_of(picture, delta, torch.tensor(nats), images, FIRST, late=True)
    assert float(late) == pytest.approx(expected + 0.09)
    small = loss_of(picture, delta / 100, torch.tensor(nats), images, FIRST, late=True)
    bare = loss_of(picture, delta / 100, torch.tensor(nats), images, FIRST, late=False)
    assert float(small - bare) == pytest.approx(disentangle.SMALLEST_DELTA)


def test_the_second_stage_allows_more() -> None:
    # main_vae_disentangle.py of the authors: `kld_weight = 0.01 if kld_target > 0.99 else 0.5`
    assert (FIRST.rate, FIRST.weight, SECOND.rate, SECOND.weight) == (1.0, 0.01, 2.5, 0.01)


def test_sizes_at_the_authors_width() -> None:
    network = DisentanglingVAE(10, width=64)
    assert network.latent == 256
    assert network.of_label.weight.shape == (10, 128)
    with torch.no_grad():
        picture, delta, nats = network(torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))
    assert picture.shape == delta.shape == (2, 3, 32, 32)
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert nats.ndim == 0
    assert sum(isinstance(part, nn.ConvTranspose2d) for part in network.modules()) == 2


def test_without_noise_the_latent_map_is_its_mean_and_the_label_changes_the_delta_alone() -> None:
    network = DisentanglingVAE(3).eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        one, other = (network(images, torch.tensor(labels)) for labels in ([0, 1], [2, 1]))
        again = network(images, torch.tensor([0, 1]), torch.zeros(2, network.latent, SIDE // 2, SIDE // 2))
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[0], again[0])
    assert not torch.equal(one[1][0], other[1][0])
    torch.testing.assert_close(one[1][1], other[1][1])


@pytest.mark.slow
def test_what_a_class_shares_is_taken_off_and_the_picture_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentangle, "EPOCHS", 40)
    images, labels = pictures(256)
    signs = np.random.default_rng(0).choice([-16, 16], (CLASSES, 3, SIDE, SIDE)).astype(np.int16)
    deltas = torch.from_numpy(signs)[labels]
    protected = (images.short() + deltas).clamp(0, 255).to(torch.uint8)
    cleaned = purified(protected, labels, seed=0, device=torch.device("cpu"))
    assert cleaned.dtype == torch.uint8

    def along(changed: Tensor) -> float:
        """Share of the deltas that is left."""
        return float(((changed.short() - images.short()) * deltas).sum() / deltas.square().sum())

    assert along(protected) > 0.99
    assert along(cleaned) < 0.25
    alike = np.corrcoef(cleaned.flatten().numpy(), images.flatten().numpy())[0, 1]
    assert alike > 0.65  # 40 epochs are few


def test_equal_seeds_give_equal_images_and_odd_sides_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentangle, "EPOCHS", 2)
    images, labels = pictures(40)
    images = images[:, :, :15, :15]
    regime = find_regime("d-vae")
    first, again, other = (regime.prepare(images, labels, seed=seed) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(regime.prepare_test(images), images)
