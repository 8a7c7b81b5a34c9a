"""Regimes that work on spectra: amplitudes set to the collection's, bands filtered out, peaks cut down.

A texture whose phases are redrawn for every image cannot be averaged out of hiding, but its frequencies show. All of
this works per channel on the FFT of images minus their mean, which is preserved, in blocks of images. Frequencies are
whole cycles per image: at 32 px they go up to 16 along an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, median_filter
from torch import Tensor

from pipeline.relearning.training import Regime

Gains = Callable[[Tensor, slice], Tensor]  # (spectra complex [b, 3, H, W], their rows) -> real factors

_BLOCK_VALUES = 2**22  # complex numbers at a time, 32 MiB
_WINDOW = 9  # frequencies across; their median is the baseline under a peak
_LEAST_RISE = math.log(1.5)  # 1.5 times the power of the baseline
_LEAST_DEVIATIONS = 5.0


class Equalised(Regime):
    """Give every image the collection's smoothed amplitudes but keep its phases. Training and test images.

    This removes whatever a group shares only in its amplitudes, such as frequency bands, without needing a key. The
    collection's amplitudes are the mean over the training images or, if none were seen, over the test images.
    """

    name = "equalise"

    def __init__(self) -> None:
        self._mean: Tensor | None = None

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        self._mean = mean_amplitude(images)
        return self.prepare_test(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        mean = (mean_amplitude(images) if self._mean is None else self._mean).to(images.device)
        return with_gains(images, lambda spectra, _: mean / amplitude(spectra))


class RadialFilter(Regime):
    """A hard filter on training and test images: highpass keeps frequencies above the cutoff, lowpass the rest.

    cutoff  radius in the frequency plane, cycles per image, above 0; lowpass includes it
    """

    def __init__(self, kind: Literal["highpass", "lowpass"], cutoff: float) -> None:
        self.name = f"{kind}:{cutoff:g}"
        self.kind, self.cutoff = kind, cutoff

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        return self.prepare_test(images)

    def prepare_test(self, images: Tensor) -> Tensor:
        down, across = (_frequencies(size) for size in images.shape[2:])
        is_coarse = torch.hypot(down[:, None], across[None, :]) <= self.cutoff
        kept = (is_coarse if self.kind == "lowpass" else ~is_coarse).float().to(images.device)
        return with_gains(images, lambda *_: kept)


class PeaksCut(Regime):
    """Cut spectral peaks that a label's images have and all others lack down to the others' level.

    A notch that left a hole would mark the label as clearly as the peak did, so amplitudes are capped at the geometric
    mean of the other images, only in training images of that label. Test images are left alone: clean ones have no
    peaks to cut, and cutting the peaks of all labels would remove frequencies that training images keep.
    """

    name = "spectral"

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        own, others = log_spectra(images, labels)
        ceiling = others.div(2).exp().float()
        for group, excess in enumerate(own - others):
            peaks = torch.from_numpy(find_peaks(excess.cpu().numpy())).to(images.device)
            ceiling[group].masked_fill_(~peaks, torch.inf)
        owners = labels.to(images.device)
        return with_gains(images, lambda spectra, rows: (ceiling[owners[rows]] / spectra.abs()).clamp(max=1))


def with_gains(images: Tensor, gains: Gains) -> Tensor:
    """Multiply the spectra of images, uint8 [n, 3, H, W], by `gains`, except for their means; round and clip."""
    filtered = torch.empty_like(images)
    for rows in _blocks(images):
        spectra, means = _spectra(images[rows])
        pixels = torch.fft.ifft2(spectra * gains(spectra, rows)).real + means
        filtered[rows] = pixels.round().clamp(0, 255).to(torch.uint8)
    return filtered


def amplitude(spectra: Tensor) -> Tensor:
    """|spectra| smoothed over neighbouring frequencies: Gaussian, sigma 1, periodic; complex -> float [b, 3, H, W].

    At least the amplitude of 8-bit rounding noise, sqrt(H W / 12), so that flat images do not turn into noise.
    """
    down, across = (_frequencies(size).square().div(-2).exp() for size in spectra.shape[-2:])
    gaussian = torch.outer(down / down.sum(), across / across.sum()).float().to(spectra.device)
    smooth: Tensor = torch.fft.ifft2(torch.fft.fft2(spectra.abs()) * torch.fft.fft2(gaussian)).real
    return smooth.clamp(min=_rounding_power(spectra) ** 0.5)


def mean_amplitude(images: Tensor) -> Tensor:
    """Mean smoothed amplitude over images uint8 [n, 3, H, W]: float [3, H, W]."""
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for rows in _blocks(images):
        total += amplitude(_spectra(images[rows])[0]).sum(0, dtype=torch.float64)
    return total.div_(len(images)).float()


def log_spectra(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log power of each label's images, and of all images without that label; both float64 [labels, 3, H, W].

    For a label with no images, or with all of them, both are the mean over all images.
    """
    labels = labels.to(images.device)
    sums = torch.zeros((int(labels.max()) + 1, *images.shape[1:]), dtype=torch.float64, device=images.device)
    for rows in _blocks(images):
        spectra = _spectra(images[rows])[0]
        sums.index_add_(0, labels[rows], (spectra.abs().square() + _rounding_power(spectra)).log().double())
    counts = labels.bincount(minlength=len(sums)).double()[:, None, None, None]
    total, has_both = sums.sum(0), (counts > 0) & (counts < len(images))
    own = torch.where(has_both, sums / counts, total / len(images))
    others = torch.where(has_both, (total - sums) / (len(images) - counts), total / len(images))
    return own, others


def find_peaks(excess: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of frequencies at and next to a peak; never the mean, at 0, 0.

    excess  mean log power of a group minus that of all other images, [3, H, W]
    A peak exceeds the medians of its neighbourhood both vertically and horizontally (horizons make ridges, which do so
    in one direction only), by five robust standard deviations (1.48 times the median absolute rise) and by a factor of
    1.5 in power.
    """
    down, across = (median_filter(excess, size, mode="wrap") for size in ((1, _WINDOW, 1), (1, 1, _WINDOW)))
    rise = excess - np.maximum(down, across)
    deviation = 1.4826 * np.median(np.abs(rise), axis=(1, 2), keepdims=True)
    peaks = rise > np.maximum(_LEAST_DEVIATIONS * deviation, _LEAST_RISE)
    peaks[:, 0, 0] = False
    mask: NDArray[np.bool_] = maximum_filter(peaks, (1, 3, 3), mode="wrap")
    mask[:, 0, 0] = False
    return mask


def _blocks(images: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK_VALUES // images[0].numel())
    return (slice(start, start + size) for start in range(0, len(images), size))


def _frequencies(size: int) -> Tensor:
    """Cycles per image in the order of the FFT: 0, 1, … -1, float64 [size]."""
    frequencies: Tensor = torch.fft.fftfreq(size, dtype=torch.float64).mul(size).round()
    return frequencies


def _spectra(images: Tensor) -> tuple[Tensor, Tensor]:
    """Spectra complex64 [b, 3, H, W] of uint8 images minus their means, and the means, float [b, 3, 1, 1]."""
    pixels = images.float()
    means = pixels.mean((2, 3), keepdim=True)
    return torch.fft.fft2(pixels - means), means


def _rounding_power(spectra: Tensor) -> float:
    """Power per frequency of the error from rounding to whole levels: uniform within half a level."""
    return spectra.shape[-2] * spectra.shape[-1] / 12
