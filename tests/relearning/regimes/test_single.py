"""Single augmentations: what they do to each image is torchvision's, and how often is what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pipeline.relearning.regimes import find_regime

IMAGES = torch.rand(200, 3, 6, 5, generator=torch.Generator().manual_seed(1)).float()


def seen(name: str, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    """What the regime makes of the images, and the numbers in [0, 1) that it drew, one for each."""
    before = images.clone()
    made = find_regime(name).batch(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    return made, torch.rand(len(images), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gamma", lambda image, drawn: transforms.adjust_gamma(image, 2 ** (2 * drawn - 1))),
        ("brightness", lambda image, drawn: transforms.adjust_brightness(image, 0.6 + 0.8 * drawn)),
        ("solarize", lambda image, drawn: transforms.solarize(image, 0.5) if drawn < 0.5 else image),
        ("hue", lambda image, drawn: transforms.adjust_hue(image, 0.2 * drawn - 0.1)),
        ("grayscale", lambda image, drawn: transforms.rgb_to_grayscale(image, 3) if drawn < 0.2 else image),
    ],
)
def test_every_image_is_changed_as_torchvision_changes_it(name: str, expected: Callable[[Tensor, float], Tensor]):
    made, drawn = seen(name)
    wanted = torch.stack([expected(image, float(one)) for image, one in zip(IMAGES, drawn, strict=True)])
    assert made.shape == IMAGES.shape
    assert torch.allclose(made, wanted, atol=1e-5)
    assert 0 <= made.min() <= made.max() <= 1


def test_one_image_by_hand():
    images = torch.tensor([0.25, 0.5, 1.0]).view(1, 3, 1, 1).repeat(400, 1, 1, 1)
    gamma = seen("gamma", images)[0][:, :, 0, 0]
    assert (gamma[:, 0].min(), gamma[:, 0].max()) == (pytest.approx(0.0625, abs=0.005), pytest.approx(0.5, abs=0.01))
    assert torch.allclose(gamma[:, 1].square(), gamma[:, 0], atol=1e-5)  # (1/4)^g = ((1/2)^g)^2
    assert torch.equal(gamma[:, 2], torch.ones(400))
    turned = seen("solarize", images)[0][:, :, 0, 0]
    is_turned = turned[:, 2] == 0
    assert 160 <= int(is_turned.sum()) <= 240
    assert turned[is_turned].unique(dim=0).tolist() == [[0.25, 0.5, 0.0]]
    grey = seen("grayscale", images)[0][:, :, 0, 0]
    is_grey = grey[:, 0] == grey[:, 2]
    assert 55 <= int(is_grey.sum()) <= 105
    assert grey[is_grey][0].tolist() == pytest.approx([0.299 * 0.25 + 0.587 * 0.5 + 0.114] * 3, abs=1e-3)


def test_jitter_is_the_papers_cg_without_grey():
    red = torch.tensor([0.4, 0.25, 0.3]).view(1, 3, 1, 1).expand(1000, 3, 2, 2)
    torch.manual_seed(0)
    made = find_regime("jitter").batch(red, torch.Generator())[:, :, 0, 0]
    untouched = (made - red[0, :, 0, 0]).abs().amax(1) < 1e-5
    assert float(untouched.float().mean()) == pytest.approx(0.2, abs=0.04)
    assert float(((made.amax(1) - made.amin(1)) < 1e-5).float().mean()) < 0.01
    torch.manual_seed(0)
    both = find_regime("cg-paper").batch(red, torch.Generator())[:, :, 0, 0]
    is_grey = (both.amax(1) - both.amin(1)) < 1e-5
    assert torch.equal(both[~is_grey], made[~is_grey])
