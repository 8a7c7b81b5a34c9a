"""Random views of a batch: crop, flip, colour. All draws come from the caller's generator.

All of them are differentiable, so that deltas can be optimised over what training will do to them (expectation over
transformation, Athalye et al. 2018). Draws are made on the CPU, so that every device sees the same views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as used by image libraries
BRIGHTNESS = CONTRAST = 0.4
SATURATION = 0.8
SHUFFLE_SHARE = 0.3
GREY_SHARE = 0.5


@dataclass(frozen=True)
class Views:
    """Source row and column of every pixel of a view, with reflection and flip resolved: int64 [B, side]."""

    rows: Tensor
    columns: Tensor


def random_views(count: int, source: int, side: int, padding: int, rng: torch.Generator) -> Views:
    """`count` random square crops of `side` px from images of `source` px; half of them flipped.

    padding  pixels of reflection padding at every edge; less than `source`
    Raises ValueError if the padding is too large to reflect, or a crop does not fit.
    """
    room = source + 2 * padding - side
    if not 0 <= padding < source:
        raise ValueError(f"{source} px cannot be padded by {padding}: reflection needs less")
    if room < 0:
        raise ValueError(f"a window of {side} px does not fit {source} px padded by {padding}")
    steps = torch.arange(side)
    rows = torch.randint(room + 1, (count, 1), generator=rng) + steps
    columns = torch.randint(room + 1, (count, 1), generator=rng) + steps
    flipped = torch.rand(count, 1, generator=rng) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    return Views(_reflect(rows - padding, source), _reflect(columns - padding, source))


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def take(images: Tensor, views: Views) -> Tensor:
    """Views of images [B, C, S, S], any dtype -> [B, C, side, side], channels last in memory.

    If gradients are needed, it multiplies by selection matrices: equally exact, but unlike indexing, the backward pass
    sums in a fixed order on every device.
    """
    rows, columns = views.rows.to(images.device), views.columns.to(images.device)
    if not images.requires_grad:
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    select_rows = F.one_hot(rows, images.shape[2]).to(images.dtype)[:, None]
    select_columns = F.one_hot(columns, images.shape[3]).to(images.dtype)[:, None]
    seen = select_rows @ images @ select_columns.transpose(2, 3)
    return seen.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ColourChanges:
    """Colour changes for each of B images.

    mix   float [B, 3, 3]: new channels from old ones
    turn  float [B]: share of the image's mean grey that is added
    """

    mix: Tensor
    turn: Tensor


def colour_changes(count: int, rng: torch.Generator) -> ColourChanges:
    """Brightness and contrast +-40 %, saturation +-80 %, channels shuffled in 30 %, grey in 50 % of `count` images.

    All five are linear apart from the mean used by contrast, hence one 3 x 3 matrix and one offset per image.
    """
    brightness = 1 + BRIGHTNESS * _symmetric(count, rng)
    contrast = 1 + CONTRAST * _symmetric(count, rng)
    saturation = (1 + SATURATION * _symmetric(count, rng))[:, None, None]
    to_grey = torch.tensor(GREY).expand(3, 3)
    mix = saturation * torch.eye(3) + (1 - saturation) * to_grey
    order = torch.rand(count, 3, generator=rng).argsort(1)
    shuffled = torch.rand(count, 1, generator=rng) < SHUFFLE_SHARE
    order = torch.where(shuffled, order, torch.arange(3))
    mix = torch.gather(mix, 1, order[:, :, None].expand(-1, -1, 3))
    grey = torch.rand(count, generator=rng) < GREY_SHARE
    mix = torch.where(grey[:, None, None], to_grey @ mix, mix)
    return ColourChanges(mix * (brightness * contrast)[:, None, None], brightness * (1 - contrast))


def recoloured(images: Tensor, changes: ColourChanges) -> Tensor:
    """Apply colour changes to images, float [B, 3, H, W] in [0, 1], clamping once at the end."""
    mix, turn = changes.mix.to(images.device), changes.turn.to(images.device)
    mean_grey = images.mean((2, 3)) @ torch.tensor(GREY, device=images.device)
    mixed = (mix[:, :, :, None, None] * images[:, None]).sum(2) + (turn * mean_grey)[:, None, None, None]
    return mixed.clamp(0, 1)


def colour_jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Apply random colour changes to each image, float [B, 3, H, W] in [0, 1]."""
    return recoloured(images, colour_changes(len(images), rng))


def _symmetric(count: int, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, generator=rng) - 1
