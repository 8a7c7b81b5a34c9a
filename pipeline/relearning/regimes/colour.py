"""NT-CG: colour jitter and random grayscale, the strongest single augmentation against deltas carried by colour."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment import colour_jitter
from pipeline.relearning.regimes.base import Regime


class ColourAndGray(Regime):
    """Per image brightness, contrast and saturation, shuffled channels, grey: see `colour_jitter` for the ranges."""

    name = "nt-cg"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return colour_jitter(images, rng)
