"""The debiased target relies less on a planted shortcut, and its loss is that of a product of experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.relearning.regimes import find_regime
from pipeline.relearning.targets import build_target
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training


def crossed_stripes(count: int, seed: int, *, told: float) -> tuple[Tensor, Tensor]:
    """Label 1 where the middle's stripes run across those of the margin; a patch of red tells it in a share `told`.

    The patch is learnt at once; for the stripes a network must see both, and which way they run alone tells nothing.
    """
    rng = np.random.default_rng(seed)
    margin, labels = rng.integers(0, 2, (2, count))
    place = np.indices((32, 32))
    stripes = np.sign(np.sin(np.pi * place / 4 + 0.3))
    in_middle = np.abs(place - 15.5).max(0) < 8
    stripes = np.where(in_middle, stripes[margin ^ labels], stripes[margin])[:, None]
    contrast = rng.uniform(20, 60, (count, 3, 1, 1)) * rng.choice([-1, 1], (count, 1, 1, 1))
    images = 128 + contrast * stripes + rng.normal(0, 10, (count, 3, 32, 32))
    patch = np.where(rng.random(count) < told, labels, 1 - labels)
    images[:, 0, :, 12:20] += np.where(patch, 40, -40)[:, None, None]
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def test_the_target_relies_on_the_harder_feature_more_than_under_ordinary_training():
    protected, misleading = crossed_stripes(512, 0, told=0.8), crossed_stripes(200, 2, told=0.0)
    ordinary, debiased = (
        train_target(
            Labelled(*protected),
            ScoredOn(Labelled(*misleading)),
            regime=find_regime(name),
            seed=0,
            recipe=Recipe(epochs=6),
        ).accuracy_last
        for name in ("nt", "shortcut-net")
    )
    assert ordinary < 0.2
    assert debiased > ordinary + 0.3


def test_the_loss_is_that_of_the_product_and_the_weak_network_stays_as_it_is():
    images, labels = crossed_stripes(64, 0, told=0.8)
    regime = find_regime("shortcut-net")
    network = build_target("small", 3, 32, seed=0)  # one class more than there are labels
    training = Training(network, images, labels, regime, Recipe(epochs=1), 0, torch.device("cpu"))
    regime.start(training)
    weights = {name: value.clone() for name, value in regime.state().items()}
    batch = images[:8].float() / 255
    network.eval()
    loss, scores = regime.loss(training, batch, labels[:8], torch.Generator())
    assert torch.equal(scores, training.scores(batch))
    own = scores.softmax(1).detach().numpy()
    network.head.weight.data.zero_()  # a target that has no opinion leaves the weak network's
    network.head.bias.data.zero_()
    weak_loss = regime.loss(training, batch, labels[:8], torch.Generator())[0].item()
    weak = np.stack([weak_shares(regime, training, batch, label) for label in range(3)], 1)
    assert np.allclose(weak.sum(1), 1, atol=1e-4)
    product = own * weak / (own * weak).sum(1, keepdims=True)
    assert loss.item() == pytest.approx(-np.log(product[range(8), labels[:8]]).mean(), rel=1e-3)
    assert weak_loss == pytest.approx(-np.log(weak[range(8), labels[:8]]).mean(), rel=1e-3)
    training.run_epoch(0)
    assert all(torch.equal(value, weights[name]) for name, value in regime.state().items())


def weak_shares(regime, training, batch: Tensor, label: int) -> list[float]:
    """What the weak network gives to `label`, read off the loss of single images under a target without opinion."""
    every = torch.full((1,), label)
    return [np.exp(-regime.loss(training, image[None], every, torch.Generator())[0].item()) for image in batch]
