"""Colour jitter and random grayscale (CG), the strongest single augmentation against deltas carried by colour."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.pictures.augment import colour_jitter
from pipeline.relearning.training import Regime


class ColourAndGray(Regime):
    """Per image brightness, contrast and saturation, shuffled channels, grey: see `colour_jitter` for the ranges."""

    name = "nt-cg"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return colour_jitter(images, rng)


class PaperColour(Regime):
    """CG as Dang et al. have it (section IV-A4): colour jitter in 80 % of the images, grey in 20 %.

    The jitter changes brightness, contrast, saturation and hue (section IV-C6). Its strengths, which the paper does not
    give, are those of SimCLR on small images: .4, .4, .4, .1. ColourAndGray is stronger but for hue.
    """

    name = "cg-paper"

    def __init__(self) -> None:
        import kornia.augmentation as augmentation

        self._views = nn.Sequential(
            augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augmentation.RandomGrayscale(p=0.2)
        )

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        seen: Tensor = self._views(images)
        return seen.clamp(0, 1)
