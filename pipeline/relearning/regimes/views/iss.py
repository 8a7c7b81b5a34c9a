"""Image Shortcut Squeezing: plain compression before training (Liu, Zhao & Larson, ICML 2023)."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.pictures.augment import GREY
from pipeline.relearning.training import Regime


class Squeezing(Regime):
    """Images go through `squeeze` once, before cropping and flipping.

    name         gets the suffix -train if test images are left alone, which is the paper's default
    tests_too    squeeze test images as well
    """

    def __init__(self, name: str, tests_too: bool) -> None:
        self.name = name if tests_too else f"{name}-train"
        self.tests_too = tests_too

    def squeeze(self, images: Tensor) -> Tensor:
        """Images uint8 [n, 3, H, W] -> the same."""
        return images

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        return self.squeeze(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        return self.squeeze(images) if self.tests_too else images


class JpegCompression(Squeezing):
    """JPEG at one quality (the paper: 10), as Pillow encodes it (4:2:0)."""

    def __init__(self, quality: int, tests_too: bool = True) -> None:
        super().__init__(f"iss-jpeg{quality}", tests_too)
        self.quality = quality

    def squeeze(self, images: Tensor) -> Tensor:
        """Encode and decode every image."""
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        coded = np.stack([self._through(array) for array in arrays])
        return torch.from_numpy(coded).permute(0, 3, 1, 2).to(images.device)

    def _through(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file))


class Grayscale(Squeezing):
    """Greyscale: three equal channels."""

    def __init__(self, tests_too: bool = True) -> None:
        super().__init__("iss-gray", tests_too)

    def squeeze(self, images: Tensor) -> Tensor:
        """Luma in all three channels."""
        weights = torch.tensor(GREY, device=images.device)[:, None, None]
        grey = (images * weights).sum(dim=1, keepdim=True).round()
        return grey.to(torch.uint8).expand_as(images).contiguous()


class BitDepth(Squeezing):
    """Few bits per channel (the paper: 2): the nearest of 2^bits equally spaced levels, including black and white."""

    def __init__(self, bits: int, tests_too: bool = True) -> None:
        super().__init__(f"iss-bits{bits}", tests_too)
        self.bits = bits

    def squeeze(self, images: Tensor) -> Tensor:
        """Round every value to the nearest level (Xu et al. 2018, feature squeezing)."""
        steps = 2**self.bits - 1
        levels = torch.arange(256).mul(steps / 255).round().mul(255 / steps).round().to(torch.uint8)
        return levels.to(images.device)[images.int()]
