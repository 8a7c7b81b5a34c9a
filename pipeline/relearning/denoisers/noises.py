"""Noise that resembles deltas, within epsilon, for training a denoiser without any protected image.

All draws come from the caller's generator, on the CPU, so that every device sees the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_STRENGTH = 0.25  # times epsilon: an adversary does not know it exactly
_GREY_SHARE = 0.5  # share of noise that is equal in all channels, like deltas that survive colour jitter
_WAVES = 12
_CYCLES = (1.0, 14.0)  # per image: from shading to the finest detail 32 pixels can show


def draw_noise(count: int, side: int, epsilon: float, rng: torch.Generator) -> Tensor:
    """float32 [count, 3, side, side], |noise| <= epsilon in pixel units; each draws a family and a strength."""
    families = torch.randint(len(FAMILIES), (count,), generator=rng)
    noise = torch.empty(count, 3, side, side)
    for number, family in enumerate(FAMILIES.values()):
        chosen = families == number
        if chosen.any():
            noise[chosen] = family(int(chosen.sum()), side, rng)
    grey = torch.rand(count, 1, 1, 1, generator=rng) < _GREY_SHARE
    strength = _LEAST_STRENGTH + (1 - _LEAST_STRENGTH) * torch.rand(count, 1, 1, 1, generator=rng)
    return torch.where(grey, noise[:, :1], noise) * strength * epsilon


def _uniform(count: int, side: int, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 3, side, side, generator=rng) - 1


def _gaussian(count: int, side: int, rng: torch.Generator) -> Tensor:
    return (torch.randn(count, 3, side, side, generator=rng) / 2).clamp(-1, 1)


def _signs(count: int, side: int, rng: torch.Generator) -> Tensor:
    return _uniform(count, side, rng).sign()


def _smooth(count: int, side: int, rng: torch.Generator) -> Tensor:
    """Uniform noise on a grid of two to eight cells, upsampled, each stretched to the bound."""
    cells = int(torch.randint(2, 9, (), generator=rng))
    field = F.interpolate(_uniform(count, cells, rng), (side, side), mode="bicubic", align_corners=False)
    return field / field.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


def _blocks(count: int, side: int, rng: torch.Generator) -> Tensor:
    """Signs on a randomly offset grid with cells of two pixels up to a quarter of the side."""
    cell = int(torch.randint(2, max(3, side // 4 + 1), (), generator=rng))
    signs = _signs(count, math.ceil(side / cell) + 1, rng)
    top, left = (int(torch.randint(cell, (), generator=rng)) for _ in range(2))
    large = signs.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return large[:, :, top : top + side, left : left + side]


def _textures(count: int, side: int, rng: torch.Generator) -> Tensor:
    """Sums of waves of random frequency and phase, squashed, like those pipeline.deltas.textures derives from a key."""
    low, high = _CYCLES
    radius = low + (high - low) * torch.rand(count, 3, _WAVES, 1, 1, generator=rng)
    angle, phase = (2 * math.pi * torch.rand(count, 3, _WAVES, 1, 1, generator=rng) for _ in range(2))
    place = 2 * math.pi * (torch.arange(side) + 0.5) / side
    turns = radius * (angle.cos() * place[None, :] + angle.sin() * place[:, None])
    waves = (turns + phase).cos().sum(2)
    return torch.tanh(2 * waves / waves.std((2, 3), keepdim=True).clamp(min=1e-6))


FAMILIES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {  # count, side, generator -> [count, 3, S, S]
    "uniform": _uniform,
    "gaussian": _gaussian,
    "signs": _signs,
    "smooth": _smooth,
    "blocks": _blocks,
    "textures": _textures,
}
