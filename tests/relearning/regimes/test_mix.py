"""Mixing regimes: shares of images and of labels agree, squares have the size and place that the papers state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.relearning.regimes import find_regime
from pipeline.relearning.targets import build_target
from pipeline.relearning.training import Recipe, Training


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=generator(0)) * 0.8 + 0.1


class Watched(Training):
    """Remembers what the network was shown."""

    def scores(self, images: Tensor) -> Tensor:
        self.shown = images
        return super().scores(images)


def watched(name: str, labels: Tensor) -> Watched:
    pixels = images(len(labels)).mul(255).to(torch.uint8)
    network = build_target("small", 5, 32, seed=0)  # one class more than there are labels
    training = Watched(network, pixels, labels, find_regime(name), Recipe(), 0, torch.device("cpu"))
    training.regime.start(training)
    return training


@pytest.mark.parametrize(("name", "mixer"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_mixed_images_and_the_loss_of_mixed_labels_are_torchvisions(name, mixer):
    labels = torch.arange(16) % 4
    training = watched(name, labels)
    training.network.eval()
    seed = next(s for s in range(9) if torch.rand((), generator=generator(s)) < 0.5)  # cutmix mixes half the batches
    torch.manual_seed(3)
    loss, scores = training.regime.loss(training, images(), labels, generator(seed))
    torch.manual_seed(3)
    expected, shares = mixer(alpha=1.0, num_classes=5)(images(), labels)
    assert torch.equal(training.shown, expected)
    smoothed = 0.9 * shares + 0.1 / 5
    assert torch.allclose(loss, -(smoothed * F.log_softmax(scores, 1)).sum(1).mean())
    assert scores.shape == (16, 5)


def test_cutmix_leaves_half_of_the_batches_alone():
    labels = torch.arange(16) % 4
    training = watched("cutmix", labels)
    untouched = 0
    for seed in range(60):
        training.regime.loss(training, images(), labels, generator(seed))
        untouched += torch.equal(training.shown, images())
    assert 18 <= untouched <= 42


def test_cutout_blanks_one_square_of_half_the_side_per_image_in_the_mean_colour():
    labels = torch.zeros(400, dtype=torch.int64)
    training = watched("cutout", labels)
    before = images(400)
    cut = training.regime.batch(before, generator(1))
    changed = (cut != before).any(1)
    assert torch.allclose(cut.permute(0, 2, 3, 1)[changed], training.mean.flatten(), atol=1e-6)
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), heights * widths)  # a full rectangle
    assert int(heights.max()) == int(widths.max()) == 16
    assert int(heights.min()) == int(widths.min()) == 8  # centred on the border
    assert len({tuple(row.tolist()) for row in changed.any(2)}) > 20


def test_the_released_mixup_is_a_fixed_tenth_of_another_image():
    mixed = find_regime("mixup-uc").batch(images(), generator(1))
    others = (mixed - 0.9 * images()) / 0.1
    distances = (others[:, None] - images()[None]).abs().amax((2, 3, 4))
    assert float(distances.amin(1).max()) < 1e-5
    assert sorted(distances.argmin(1).tolist()) == list(range(16))


def test_the_released_cutmix_and_cutout_use_one_square_of_a_tenth_of_the_area():
    for name in ("cutmix-uc", "cutout-uc"):
        found = find_regime(name).batch(images(), generator(2))
        changed = (found != images()).any(1).any(0)
        assert int(changed.sum()) == 100  # 10 x 10 of 32 x 32
        assert int(changed.any(0).sum()) == 10
    assert float(found[:, :, changed].abs().max()) == 0


def test_channel_mixup_moves_an_image_towards_one_of_its_own_channels():
    before = images(64)
    found = find_regime("mixup-14a").batch(before, generator(3))
    unchanged = (found - before).abs().amax((2, 3)) < 1e-6
    assert (unchanged.sum(1) == 1).all()  # the chosen channel, mixed with itself
    channel = unchanged.int().argmax(1)
    assert set(channel.tolist()) == {0, 1, 2}
    own = before[torch.arange(64), channel][:, None]
    kept = ((found - own) * (before - own)).sum((1, 2, 3)) / (before - own).square().sum((1, 2, 3))
    assert torch.allclose(found, own + kept.view(-1, 1, 1, 1) * (before - own), atol=1e-5)
    assert 0.3 < float(kept.mean()) < 0.7
    assert float(kept.std()) > 0.2
