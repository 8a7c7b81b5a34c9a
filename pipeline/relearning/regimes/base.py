"""What a regime is: how an adversary treats images on their way into ordinary training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Knowledge:
    """What an informed adversary assumes about the protection."""

    num_groups: int | None = None  # how many deltas there are; None = as many as classes
    epsilon: float = 16 / 255  # their bound, in [0, 1] pixel units


class Regime:
    """Ordinary training (NT); every other regime overrides what it does differently.

    prepare        once, before training: the training images as the adversary will store them
    prepare_test   once: what the adversary does to every image it is later asked about
    batch          per step, on the device, after crop and flip
    """

    name = "nt"

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Training images uint8 [n, 3, H, W] and labels int64 [n] -> images of the same shape and dtype."""
        return images

    def prepare_test(self, images: Tensor) -> Tensor:
        """Test images uint8 [n, 3, H, W] -> the same shape and dtype."""
        return images

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """One training batch, float [B, 3, H, W] in [0, 1] -> the same; `rng` is on the CPU."""
        return images


class Composed(Regime):
    """Regimes one after the other, e.g. subtract+cg."""

    def __init__(self, name: str, parts: Sequence[Regime]) -> None:
        self.name = name
        self.parts = tuple(parts)

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        for part in self.parts:
            images = part.prepare(images, labels, seed=seed)
        return images

    def prepare_test(self, images: Tensor) -> Tensor:
        for part in self.parts:
            images = part.prepare_test(images)
        return images

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        for part in self.parts:
            images = part.batch(images, rng)
        return images
