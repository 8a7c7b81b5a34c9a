"""Colour jitter and random grayscale (CG), the strongest single augmentation against deltas carried by colour."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.pictures.augment import colour_jitter
from pipeline.relearning.training import Regime


class ColourAndGray(Regime):
    """Per-image brightness, contrast, saturation, channel shuffling and grey: see `colour_jitter` for the ranges."""

    name = "nt-cg"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return colour_jitter(images, rng)


class PaperColour(Regime):
    """CG as in Dang et al. (section IV-A4): colour jitter on 80 % of the images, grey on 20 %.

    The jitter changes brightness, contrast, saturation and hue (section IV-C6). The paper does not give its strengths;
    these are SimCLR's for small images: .4, .4, .4, .1. Except for hue, ColourAndGray is stronger.

    gray_share  0: colour jitter alone
    """

    name = "cg-paper"

    def __init__(self, name: str = "cg-paper", *, gray_share: float = 0.2) -> None:
        import kornia.augmentation as augmentation

        self.name = name
        jitter = augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
        self._views = nn.Sequential(jitter, augmentation.RandomGrayscale(p=gray_share)) if gray_share else jitter

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        seen: Tensor = self._views(images)
        return seen.clamp(0, 1)
