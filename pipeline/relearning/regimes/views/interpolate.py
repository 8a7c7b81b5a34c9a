"""Every pixel from a random place near its own: COIN, made against protections that filter images, such as CUDA.

Li et al., Detecting and Corrupting Convolution-based Unlearnable Examples (AAAI 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.relearning.training import Regime

REACH = 2.0  # pixels; alpha of the authors' code


class RandomInterpolation(Regime):
    """Resample training images at random places, by bilinear interpolation, anew at every step.

    Every pixel has a place of its own, up to REACH pixels from it along either axis and equal for all channels. Images
    are continued periodically at their edges.
    """

    name = "coin"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        return resampled(images, (2 * torch.rand(count, 2, height, width, generator=rng) - 1) * REACH)


def resampled(images: Tensor, offsets: Tensor) -> Tensor:
    """Images, float [B, C, H, W], at every pixel plus its offset, float [B, 2, H, W] in pixels, down and across."""
    count, channels, height, width = images.shape
    offsets = offsets.to(images.device)
    down = torch.arange(height, device=images.device)[:, None] + offsets[:, 0]
    across = torch.arange(width, device=images.device) + offsets[:, 1]
    top, left = down.floor(), across.floor()
    below, right = (down - top)[:, None], (across - left)[:, None]
    rows, columns = top.long(), left.long()

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = (row.remainder(height) * width + column.remainder(width)).flatten(1)[:, None].expand(-1, channels, -1)
        return images.flatten(2).gather(2, index).reshape(count, channels, height, width)

    upper = at(rows, columns).lerp(at(rows, columns + 1), right)
    lower = at(rows + 1, columns).lerp(at(rows + 1, columns + 1), right)
    return upper.lerp(lower, below)
