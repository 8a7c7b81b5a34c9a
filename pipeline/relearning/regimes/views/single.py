"""One change of colour and nothing else: the single augmentations of Dang et al. 2023, Table IX.

The paper does not give their strengths. Jitter and grayscale are the halves of the regime cg-paper, brightness and hue
have its ranges; solarize and gamma are as torchvision and its users have them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pipeline.relearning.training import Regime

Change = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], strengths [B, 1, 1, 1] -> images


def _hue(images: Tensor, strengths: Tensor) -> Tensor:
    turned = zip(images, strengths.flatten().tolist(), strict=True)
    return torch.stack([transforms.adjust_hue(image, strength) for image, strength in turned])


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    return torch.where((strengths < 0.5) & (images >= 0.5), 1 - images, images)


def _grayscale(images: Tensor, strengths: Tensor) -> Tensor:
    return torch.where(strengths < 0.2, transforms.rgb_to_grayscale(images, 3), images)


# name -> range of the strength, drawn evenly for every image, and what it does
CHANGES: dict[str, tuple[float, float, Change]] = {
    "gamma": (-1.0, 1.0, lambda images, strengths: images**2**strengths),
    "brightness": (0.6, 1.4, lambda images, strengths: images * strengths),
    "solarize": (0.0, 1.0, _solarize),
    "hue": (-0.1, 0.1, _hue),
    "grayscale": (0.0, 1.0, _grayscale),
}


class SingleChange(Regime):
    """Every training image changed in one respect, by a strength of its own.

    name  one of CHANGES
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._least, self._most, self._change = CHANGES[name]

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        drawn = torch.rand(len(images), 1, 1, 1, generator=rng)
        strengths = self._least + (self._most - self._least) * drawn
        return self._change(images, strengths.to(images.device)).clamp(0, 1)
