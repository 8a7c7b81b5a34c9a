"""Random sharpening and a frequency filter: made against protections that blur each class in its own way.

Kim and Sandoval-Segura, Learning from Convolution-based Unlearnable Datasets (2024), with the settings of their code.
"""

from __future__ import annotations

import torch
from scipy.fft import dct
from torch import Tensor
from torch.nn import functional as F

from pipeline.relearning.training import Regime

CENTRE = 2.5  # mean weight of the pixel itself
DEVIATION = 0.1  # of every weight
KEPT = 0.3  # of the rows and of the columns of the cosine transform


class SharpenedAndFiltered(Regime):
    """Sharpen every training image by a kernel of its own, anew at every step, and keep its low frequencies only.

    Images keep their size: they are reflected at their edges, where the authors' shrink by a pixel on each side.
    """

    name = "rsk-ff"

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        kernels = sharpening_kernels(len(images), rng).to(images.device)
        return low_frequencies(sharpened(images, kernels).clamp(0, 1), KEPT).clamp(0, 1)


def sharpening_kernels(count: int, rng: torch.Generator) -> Tensor:
    """Random kernels, float [count, 3, 3]: the four neighbours are subtracted, and the weights' mean sum is 1."""
    centre = CENTRE + DEVIATION * torch.randn(count, generator=rng)
    neighbours = (centre[:, None] - 1) / 4 + DEVIATION * torch.randn(count, 4, generator=rng)
    kernels = torch.zeros(count, 9)
    kernels[:, 4] = centre
    kernels[:, 1::2] = -neighbours
    return kernels.reshape(count, 3, 3)


def sharpened(images: Tensor, kernels: Tensor) -> Tensor:
    """Images, float [B, C, H, W], each correlated with its own kernel, of [B, 3, 3]."""
    count, channels, height, width = images.shape
    weights = kernels.repeat_interleave(channels, 0)[:, None]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect").reshape(1, count * channels, height + 2, width + 2)
    return F.conv2d(padded, weights, groups=count * channels).reshape(images.shape)


def low_frequencies(images: Tensor, share: float) -> Tensor:
    """Images, float [B, C, H, W], from only the first `share` of the rows and columns of their cosine transform."""
    rows, columns = (_projection(side, share).to(images.device) for side in images.shape[2:])
    return rows @ images @ columns


def _projection(side: int, share: float) -> Tensor:
    """Symmetric matrix, float [side, side], that keeps the first cosines of a row."""
    basis = torch.from_numpy(dct(torch.eye(side).numpy(), axis=0, norm="ortho"))[: int(side * share)]
    return basis.T @ basis
