"""Targets on pretrained weights: fine-tuned, or frozen under a linear probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.relearning.targets.base import Target
from pipeline.surrogates.pretrained import Tower, build_tower


class Encoder(nn.Module):
    """A surrogate's tower as a trunk: images float [B, 3, s, s] in [0, 1], any side -> features [B, d].

    Images are resized bilinearly, with antialiasing when reduced, and normalised as the weights expect.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.network = tower.network
        self.size = tower.preprocessing.size
        self.register_buffer("mean", torch.tensor(tower.preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(tower.preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features, [B, d]."""
        side = (self.size, self.size)
        if images.shape[-2:] != side:
            shrinks = images.shape[-1] > self.size
            images = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=shrinks)
        return self.network((images - self.mean) / self.std)  # type: ignore[no-any-return]

    @torch.no_grad()
    def dimension(self) -> int:
        """d, found by embedding a grey image."""
        return int(self(torch.full((1, 3, self.size, self.size), 0.5)).shape[1])


class PretrainedTarget(Target):
    """An encoder with published weights and a new classifier, both trained by default.

    is_frozen  train only the classifier (linear probe): the trunk needs no gradient and stays in inference mode
    """

    normalises_itself = True

    def __init__(self, encoder: Encoder, head: nn.Module, dropout: float, *, is_frozen: bool) -> None:
        super().__init__(encoder, head, dropout)
        self.is_frozen = is_frozen
        encoder.requires_grad_(not is_frozen)

    def train(self, mode: bool = True) -> PretrainedTarget:
        """Like nn.Module.train, but a frozen trunk stays in inference mode."""
        super().train(mode)
        if self.is_frozen:
            self.trunk.eval()
        return self


def build_pretrained(surrogate: str, num_classes: int, dropout: float, *, is_frozen: bool) -> PretrainedTarget:
    """A target on the weights of `surrogate`; the classifier is initialised from torch's global generator.

    Raises SettingsError for an unknown surrogate, InputError for weights that are not available.
    """
    encoder = Encoder(build_tower(surrogate, weights=None, size=None))
    head = nn.Linear(encoder.dimension(), num_classes)
    return PretrainedTarget(encoder, head, dropout, is_frozen=is_frozen)
