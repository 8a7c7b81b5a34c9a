"""Mixup, CutMix and Cutout as their authors define them, and the weaker forms that protection papers test against."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training


class MixedLabels(Regime):
    """Mix the images of a batch, and their labels likewise, with a share from Beta(1, 1) per batch.

    mixer         torchvision's MixUp (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019)
    probability   share of batches that are mixed
    Training accuracy compares the mixed images with their original labels.
    """

    def __init__(self, name: str, mixer: type[v2.MixUp] | type[v2.CutMix], probability: float) -> None:
        self.name = name
        self.mixer = mixer
        self.probability = probability

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if torch.rand((), generator=rng) >= self.probability:
            return super().loss(training, images, labels, rng)
        mix = self.mixer(alpha=1.0, num_classes=int(training.labels.max()) + 1)
        mixed, shares = mix(images, labels)
        scores = training.scores(mixed)
        # a class that only test images have gets no share
        return training.criterion(scores, F.pad(shares, (0, scores.shape[1] - shares.shape[1]))), scores


class Cutout(Regime):
    """Fill a square of half the side, centred anywhere in the image, with the mean colour (DeVries & Taylor 2017).

    The square is clipped at the border; it covers at most a quarter of the image.
    """

    name = "cutout"

    def __init__(self) -> None:
        self._mean: Tensor | None = None

    def start(self, training: Training) -> None:
        self._mean = training.mean

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        top = torch.randint(height, (count, 1), generator=rng) - height // 4
        left = torch.randint(width, (count, 1), generator=rng) - width // 4
        down, across = torch.arange(height) - top, torch.arange(width) - left
        rows, columns = (down >= 0) & (down < height // 2), (across >= 0) & (across < width // 2)
        inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
        colour = images.new_zeros(3, 1, 1) if self._mean is None else self._mean
        return torch.where(inside, colour, images)


class FixedMixup(Regime):
    """The Mixup module released with Zhang et al. 2023: x <- .9 x + .1 of another image; labels unmixed."""

    name = "mixup-uc"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return 0.9 * images + 0.1 * images[_order(images, rng)]


class FixedCutMix(Regime):
    """Their CutMix: one square of a tenth of the area, in one place per batch, from another image; labels unmixed."""

    name = "cutmix-uc"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        rows, columns = _square(images, rng)
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[_order(images, rng)][:, :, rows, columns]
        return mixed


class FixedCutout(Regime):
    """Their Cutout: one black square of a tenth of the area, in one place per batch."""

    name = "cutout-uc"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        rows, columns = _square(images, rng)
        cut = images.clone()
        cut[:, :, rows, columns] = 0
        return cut


class ChannelMixup(Regime):
    """What the code of Chen et al. 2024 calls Mixup: each image mixed with one of its own colour channels at random.

    x <- l x + (1 - l) x[c], l from Beta(1, 1) per image: a random desaturation; labels are unchanged.
    """

    name = "mixup-14a"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        share = torch.rand(len(images), 1, 1, 1, generator=rng).to(images.device)
        channel = torch.randint(3, (len(images),), generator=rng).to(images.device)
        own = images[torch.arange(len(images), device=images.device), channel][:, None]
        return share * images + (1 - share) * own


def _order(images: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randperm(len(images), generator=rng).to(images.device)


def _square(images: Tensor, rng: torch.Generator) -> tuple[slice, slice]:
    """A random square of a tenth of the area, entirely inside the image."""
    height, width = (round(math.sqrt(0.1) * side) for side in images.shape[2:])
    top = int(torch.randint(images.shape[2] - height + 1, (), generator=rng))
    left = int(torch.randint(images.shape[3] - width + 1, (), generator=rng))
    return slice(top, top + height), slice(left, left + width)
