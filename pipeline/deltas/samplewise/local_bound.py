"""How far each pixel may move: all of epsilon where a picture is busy, a share of it where it is flat.

The eye misses a change beside edges and in textures, and sees the same change in a sky or on skin (contrast masking:
Legge and Foley, J. Opt. Soc. Am. 70, 1980; as a bound for coding: Chou and Li, IEEE Trans. CSVT 5, 1995).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.pictures.augment import GREY

WINDOW = 5  # pixels; odd


def local_bound(images: Tensor, epsilon: float, flat_share: float) -> Tensor | float:
    """The bound on |delta| at every pixel: float32 [B, 1, S, S], or `epsilon` itself if flat_share is 1.

    images      float [B, 3, S, S] in [0, 1], before the delta
    epsilon     pixel units; the bound where luma varies by this much or more: standard deviation within WINDOW x WINDOW
    flat_share  of epsilon, where luma does not vary at all; linear in between
    """
    if flat_share == 1:
        return epsilon
    weights = torch.tensor(GREY, device=images.device)[:, None, None]
    luma = F.pad((images * weights).sum(1, keepdim=True), (WINDOW // 2,) * 4, mode="replicate")
    mean, square = F.avg_pool2d(luma, WINDOW, stride=1), F.avg_pool2d(luma.square(), WINDOW, stride=1)
    busy = ((square - mean.square()).clamp_min(0).sqrt() / epsilon).clamp_max(1)
    return epsilon * (flat_share + (1 - flat_share) * busy)
