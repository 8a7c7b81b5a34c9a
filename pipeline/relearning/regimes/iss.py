"""Image Shortcut Squeezing: plain compression of training and test images (Liu, Zhao & Larson, ICML 2023)."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.augment import GREY
from pipeline.relearning.regimes.base import Regime


class JpegCompression(Regime):
    """Training and test images go through JPEG at one quality (the paper: 10), as Pillow encodes it (4:2:0)."""

    def __init__(self, quality: int) -> None:
        self.name = f"iss-jpeg{quality}"
        self.quality = quality

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        return self.prepare_test(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        coded = np.stack([self._through(array) for array in arrays])
        return torch.from_numpy(coded).permute(0, 3, 1, 2).to(images.device)

    def _through(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file))


class Grayscale(Regime):
    """Training and test images lose their colour; three equal channels remain."""

    name = "iss-gray"

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        return self.prepare_test(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        weights = torch.tensor(GREY, device=images.device)[:, None, None]
        grey = (images * weights).sum(dim=1, keepdim=True).round()
        return grey.to(torch.uint8).expand_as(images).contiguous()
