"""torchvision's learned and random augmentation policies, redrawn for every image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from pipeline.relearning.training import Regime

POLICIES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "randaugment": lambda: v2.RandAugment(num_ops=2, magnitude=9),
    "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "trivialaugment": lambda: v2.TrivialAugmentWide(),
}


class AugmentationPolicy(Regime):
    """RandAugment (Cubuk et al. 2020), AutoAugment's CIFAR-10 policy (2019) or TrivialAugment (Müller & Hutter 2021).

    name   one of POLICIES
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.policy = POLICIES[name]()

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return each_image(self.policy, images)


def each_image(policy: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply `policy` to each image in 8 bits, as the policies are defined: float [B, 3, H, W] in [0, 1] -> same."""
    levels = images.mul(255).round().to(torch.uint8)
    return torch.stack([policy(image) for image in levels]).float().div(255)
