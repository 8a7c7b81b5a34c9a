"""Random views of a batch: crop, flip, colour. Every draw comes from the generator that the caller names.

Gradients pass through all of them, so that a delta can be optimised over what training will do to it
(expectation over transformation, Athalye et al. 2018). The draws are made on the CPU, so that every device
sees the same views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as image libraries turn colour into grey
BRIGHTNESS = CONTRAST = 0.4
SATURATION = 0.8
SHUFFLE_SHARE = 0.3
GREY_SHARE = 0.5


@dataclass(frozen=True)
class Views:
    """Which source row and column every pixel of a view shows, reflection and flip resolved: int64 [B, side]."""

    rows: Tensor
    columns: Tensor


def random_views(count: int, source: int, side: int, padding: int, rng: torch.Generator) -> Views:
    """`count` random square windows of `side` px on images of `source` px, half of them flipped.

    padding  pixels of reflection at every edge that the window may reach into; less than `source`
    """
    room = source + 2 * padding - side
    assert 0 <= padding < source, "reflection needs padding smaller than the image"
    assert room >= 0, f"a window of {side} px does not fit {source} px padded by {padding}"
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
    """The views of images [B, C, S, S], any dtype -> [B, C, side, side], channels last in memory.

    With gradients it multiplies by selection matrices: exact as well, and its backward pass adds in a fixed
    order on every device, which indexing does not.
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
    """What happens to the colours of each of B images: turned about its mean grey, then mixed.

    mix   float [B, 3, 3]: new channels from old ones
    turn  float [B]: share of the mean grey that is added
    """

    mix: Tensor
    turn: Tensor


def colour_changes(count: int, rng: torch.Generator) -> ColourChanges:
    """Brightness and contrast +-40 %, saturation +-80 %, channels shuffled in 30 %, grey in 50 % of `count` images.

    All five are linear but for the mean that contrast turns about, hence one 3 x 3 matrix and one offset each.
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
    """Images float [B, 3, H, W] in [0, 1] with their colours changed, clamped once at the end."""
    mix, turn = changes.mix.to(images.device), changes.turn.to(images.device)
    mean_grey = images.mean((2, 3)) @ torch.tensor(GREY, device=images.device)
    mixed = (mix[:, :, :, None, None] * images[:, None]).sum(2) + (turn * mean_grey)[:, None, None, None]
    return mixed.clamp(0, 1)


def colour_jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images float [B, 3, H, W] in [0, 1], each with colour changes of its own."""
    return recoloured(images, colour_changes(len(images), rng))


def _symmetric(count: int, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, generator=rng) - 1
