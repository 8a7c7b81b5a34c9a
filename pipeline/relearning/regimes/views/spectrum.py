"""What spectra give away is taken out: amplitudes set to those of the collection, bands filtered, peaks cut down.

A texture whose phases are drawn anew for every image survives every average, but its frequencies do not hide. All of
this works channel by channel on the FFT of images minus their mean, which stays as it is, in blocks of images.
Frequencies are whole cycles per image: at 32 px those along an axis end at 16.
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

Gains = Callable[[Tensor, slice], Tensor]  # spectra complex [b, 3, H, W] of these rows -> factors, real

_BLOCK_VALUES = 2**22  # complex numbers at a time, 32 MiB
_WINDOW = 9  # frequencies across, whose median is the level that peaks stand on
_LEAST_RISE = math.log(1.5)  # half as much power again as that level
_LEAST_DEVIATIONS = 5.0


class Equalised(Regime):
    """Every image gets the collection's smoothed amplitudes; its own phases stay. Training and test images.

    Whatever a group shares in its amplitudes alone, such as bands of frequency, is gone, and no key is needed for it.
    The collection's amplitudes are the mean over the training images; where none were seen, over the test images.
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
    """A hard filter, training and test images: highpass keeps what is finer than the cutoff, lowpass the rest.

    cutoff  radius in the plane of frequencies, cycles per image, above 0; lowpass keeps what lies on it
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
    """Where the spectrum of a label's images has peaks that all others' lack, those images are brought down to these.

    A notch that left a hole would mark the label as well as the peak did; so amplitudes are cut at the geometric mean
    of the other images, in training images of that label alone. Test images stay as they are: clean ones have no peak
    to cut, and the peaks of all labels together would take frequencies from them that training images keep.
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
    """Images uint8 [n, 3, H, W] whose spectra, but for their means, are multiplied by `gains`; rounded and clipped."""
    found = torch.empty_like(images)
    for rows in _blocks(images):
        spectra, means = _spectra(images[rows])
        pixels = torch.fft.ifft2(spectra * gains(spectra, rows)).real + means
        found[rows] = pixels.round().clamp(0, 255).to(torch.uint8)
    return found


def amplitude(spectra: Tensor) -> Tensor:
    """|spectra| smoothed over neighbouring frequencies: Gaussian, sigma 1, periodic; complex -> float [b, 3, H, W].

    Nowhere below what rounding to 8 bits alone has, sqrt(H W / 12), so that flat images do not become noise.
    """
    down, across = (_frequencies(size).square().div(-2).exp() for size in spectra.shape[-2:])
    gaussian = torch.outer(down / down.sum(), across / across.sum()).float().to(spectra.device)
    smooth: Tensor = torch.fft.ifft2(torch.fft.fft2(spectra.abs()) * torch.fft.fft2(gaussian)).real
    return smooth.clamp(min=_rounding_power(spectra) ** 0.5)


def mean_amplitude(images: Tensor) -> Tensor:
    """The mean over images uint8 [n, 3, H, W] of their smoothed amplitudes, float [3, H, W]."""
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for rows in _blocks(images):
        total += amplitude(_spectra(images[rows])[0]).sum(0, dtype=torch.float64)
    return total.div_(len(images)).float()


def log_spectra(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log power of each label's images, and of all images without that label, float64 [labels, 3, H, W] both.

    Where there are no images, or no others, both are that of all images.
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
    """Frequencies at and beside a peak; never the mean, which stands at 0, 0.

    excess  mean log power of a group minus that of all other images, [3, H, W]; a peak rises above the medians of its
            surroundings both down and across (horizons make ridges, which do so in one direction alone) by five
            deviations, of 1.48 times the median rise, and by half as much power again
    """
    down, across = (median_filter(excess, size, mode="wrap") for size in ((1, _WINDOW, 1), (1, 1, _WINDOW)))
    rise = excess - np.maximum(down, across)
    deviation = 1.4826 * np.median(np.abs(rise), axis=(1, 2), keepdims=True)
    peaks = rise > np.maximum(_LEAST_DEVIATIONS * deviation, _LEAST_RISE)
    peaks[:, 0, 0] = False
    found: NDArray[np.bool_] = maximum_filter(peaks, (1, 3, 3), mode="wrap")
    found[:, 0, 0] = False
    return found


def _blocks(images: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK_VALUES // images[0].numel())
    return (slice(start, start + size) for start in range(0, len(images), size))


def _frequencies(size: int) -> Tensor:
    """Cycles per image in the order of the FFT: 0, 1, … -1, float64 [size]."""
    found: Tensor = torch.fft.fftfreq(size, dtype=torch.float64).mul(size).round()
    return found


def _spectra(images: Tensor) -> tuple[Tensor, Tensor]:
    """Spectra complex64 [b, 3, H, W] of uint8 images minus their means, and these means, float [b, 3, 1, 1]."""
    pixels = images.float()
    means = pixels.mean((2, 3), keepdim=True)
    return torch.fft.fft2(pixels - means), means


def _rounding_power(spectra: Tensor) -> float:
    """Power per frequency of the error that rounding to whole levels makes: uniform within half a level."""
    return spectra.shape[-2] * spectra.shape[-1] / 12
