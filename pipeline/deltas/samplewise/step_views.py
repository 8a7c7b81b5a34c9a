"""What a proxy sees of an image at each step: a crop, a flip, colour changes and smoothing, drawn by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.deltas.samplewise.proxy_network import crop_padding
from pipeline.pictures.augment import GREY, ColourChanges, Views, colour_changes, random_views


@dataclass(frozen=True)
class Draws:
    """All random draws of an image, made before its first step.

    start     float [channels, S, S] in -1 ... 1
    views     a crop and flip for every step
    colours   colour changes for every step
    coloured  bool [steps]: whether the colour changes are used
    smooth    int64 [steps]: 0 unchanged, 1 mean over 3 pixels, 2 half the size and back
    """

    start: Tensor
    views: Views
    colours: ColourChanges
    coloured: Tensor
    smooth: Tensor

    @classmethod
    def of(cls, side: int, steps: int, *, plain: bool, rng: torch.Generator) -> Draws:
        """For an image of `side` pixels; `plain`: no colour changes, and a start with three channels, not one."""
        start = 2 * torch.rand(3 if plain else 1, side, side, generator=rng) - 1
        views = random_views(steps, side, side, crop_padding(side), rng)
        colours = colour_changes(steps, rng)
        coloured = (torch.rand(steps, generator=rng) < 0.5) & torch.tensor(not plain)
        return cls(start, views, colours, coloured, torch.randint(3, (steps,), generator=rng))


class StepViews:
    """A batch's views at each step, as matrices: crop, flip, smoothing over rows and columns; colour over channels."""

    def __init__(self, draws: Sequence[Draws], device: torch.device) -> None:
        self._rows, self._columns = (
            torch.stack([getattr(draw.views, name) for draw in draws], 1).to(device) for name in ("rows", "columns")
        )
        self._smooth = torch.stack([draw.smooth for draw in draws], 1).to(device)
        coloured = torch.stack([draw.coloured for draw in draws], 1)
        mix, turn = (torch.stack([getattr(draw.colours, name) for draw in draws], 1) for name in ("mix", "turn"))
        mix = torch.where(coloured[..., None, None], mix, torch.eye(3))
        turn = torch.where(coloured, turn, torch.zeros(()))
        # the added colour is a fraction of the image's mean grey, equal in all channels
        self._mix, self._turn = mix.to(device), turn.to(device)
        self._smoothers = _smoothers(self._rows.shape[2]).to(device)
        self._grey = torch.tensor(GREY, device=device)

    def seen(self, images: Tensor, step: int) -> Tensor:
        """Images float [B, 3, S, S] as a trainer might see them, each with its own draws; differentiable."""
        side = images.shape[2]
        smoothers = self._smoothers[self._smooth[step]]
        rows, columns = (
            (smoothers @ F.one_hot(index[step], side).float())[:, None] for index in (self._rows, self._columns)
        )
        seen = rows @ images @ columns.transpose(2, 3)
        grey = (seen.mean((2, 3)) @ self._grey) * self._turn[step]
        mixed = self._mix[step] @ seen.flatten(2) + grey[:, None, None]
        return F.hardtanh(mixed, 0.0, 1.0).reshape(seen.shape)


def _smoothers(side: int) -> Tensor:
    """float [3, S, S]: matrices that leave a row unchanged, average over 3 pixels, or halve its size and restore it."""
    at = torch.arange(side)
    near = ((at[:, None] - at).abs() <= 1).float()
    halves = (at[:, None] // 2 == at // 2).float()
    return torch.stack([weights / weights.sum(1, keepdim=True) for weights in (torch.eye(side), near, halves)])
