"""Orthogonal projection: remove what a linear classifier finds in the pixels (Sandoval-Segura et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.hashing import torch_rng
from pipeline.relearning.regimes.views.mix import MixedLabels
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training

_EPOCHS = 20
_BATCH = 1024
_RATE = 0.1


class OrthogonalProjection(Regime):
    """Training images minus their projection onto the weights of a linear softmax classifier, then strong augmentation.

    As in Sandoval-Segura et al. (NeurIPS 2023): rotation and shear of 10 degrees, scale .8 to 1.2, brightness, contrast
    and saturation .2, and CutMix with probability .5. Test images are unchanged.
    """

    name = "opa"

    def __init__(self) -> None:
        import kornia.augmentation as augmentation
        from torchvision.transforms import v2

        self._mix = MixedLabels("cutmix", v2.CutMix, 0.5)
        self._strong = torch.nn.Sequential(
            augmentation.RandomAffine(degrees=10.0, scale=(0.8, 1.2), shear=10.0, p=1.0),
            augmentation.ColorJitter(0.2, 0.2, 0.2, p=1.0),
        )

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        directions = linear_directions(images, labels, seed=seed)
        cleaned = torch.empty_like(images)
        for start in range(0, len(images), _BATCH):
            rows = slice(start, start + _BATCH)
            pixels = project_out(images[rows].flatten(1).float(), directions)
            cleaned[rows] = pixels.round().clamp(0, 255).to(torch.uint8).view_as(images[rows])
        return cleaned

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        strong: Tensor = self._strong(images)
        return strong.clamp(0, 1)

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._mix.loss(training, images, labels, rng)


def linear_directions(images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
    """Orthonormal columns, float [pixels, classes], that span the weights of a linear softmax classifier.

    images  uint8 [n, 3, H, W], used as raw [0, 1] pixels
    The classifier has no bias and is trained for 20 epochs by SGD without momentum, batch size 1,024, learning rate .1
    divided by 10 at half and at three quarters.
    """
    num_pixels, num_classes = images[0].numel(), int(labels.max()) + 1
    rng = torch_rng(seed, "opa")
    scale = num_pixels**-0.5
    weight = (2 * torch.rand(num_classes, num_pixels, generator=rng) - 1).mul_(scale).to(images.device)
    for epoch in range(_EPOCHS):
        rate = _RATE * 0.1 ** ((epoch >= _EPOCHS // 2) + (epoch >= _EPOCHS * 3 // 4))
        order = torch.randperm(len(images), generator=rng).to(images.device)
        for rows in torch.split(order, _BATCH):
            pixels = images[rows].flatten(1).float().div_(255)
            error = F.softmax(pixels @ weight.T, 1) - F.one_hot(labels[rows], num_classes)
            weight -= rate * error.T @ pixels / len(rows)
    orthonormal: Tensor = torch.linalg.qr(F.normalize(weight, dim=1).T)[0]
    return orthonormal


def project_out(pixels: Tensor, directions: Tensor) -> Tensor:
    """Rows, float [n, pixels], minus their projection onto the orthonormal columns of `directions`."""
    return pixels - (pixels @ directions) @ directions.T
