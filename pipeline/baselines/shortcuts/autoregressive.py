"""Autoregressive perturbations (AR): noise in which a pixel follows from its neighbours by the kernel of a label."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, Bound, LabelledPictures, Told
from pipeline.hashing import numpy_rng

Floats = NDArray[np.float64]

_CUT = 4  # rows and columns in front, where the process has not settled
_LARGEST_NORM = 50.0  # of a signal of 32 px from noise of variance 1: more is not stable
_TRIED_SIDE = 32
_POOL, _LARGEST_POOL, _PER_LABEL = 200, 1000, 40  # kernels to choose from
_ANSWERS = (10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)  # that filters are to give to the noise of others
_BLOCK = 512  # pictures at a time


class Autoregressive:
    """A kernel for each label, fresh noise for each picture; the L2 norm is 1 at 32 px, and grows with the side."""

    per_sample = True
    bound: Bound = "l2"
    figures = NO_FIGURES
    # the authors' own kernels answer each other's noise by 10 at least, and by 3 for 100 labels
    source = "autoregressive perturbations: Sandoval-Segura et al., NeurIPS 2022, with kernels of a search of our own"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [n, 3, S, S]."""
        kernels, side = ar_kernels(pictures.num_labels, settings.seed), pictures.images.shape[-1]
        levels = np.empty(pictures.images.shape, np.int16)
        for start in range(0, len(levels), _BLOCK):
            block = slice(start, start + _BLOCK)
            noise = np.stack([_noise(settings.seed, key, side) for key in pictures.keys[block]])
            signals = ar_signals(kernels[pictures.labels[block]], noise)
            # on sides beyond 32 px noise goes on growing, at 224 px to more than a picture can show in 1 of 250
            levels[block] = np.rint(255 * side / _TRIED_SIDE * _unit(signals)).clip(-255, 255)
            told(min(1.0, (start + _BLOCK) / len(levels)))
        return levels


def _noise(seed: int, key: str, side: int) -> Floats:
    return numpy_rng(seed, "autoregressive", key).standard_normal((3, side + _CUT, side + _CUT))


def ar_signals(kernels: Floats, start: Floats) -> Floats:
    """Signals [n, 3, S, S] of the processes with kernels [n, 3, 3, 3], from noise [n, 3, S + 4, S + 4].

    In raster order every pixel becomes the kernel's answer to the eight before it, whose own weight is 0.
    """
    signals, side = start.copy(), start.shape[-1]
    weights = np.moveaxis(kernels, (2, 3), (0, 1))[..., None]  # [3, 3, n, 3, 1]
    with np.errstate(over="ignore", invalid="ignore"):
        for y in range(2, side):
            above = sum(
                weights[row, column] * signals[:, :, y - 2 + row, column : side - 2 + column]
                for row in range(2)
                for column in range(3)
            )
            for x in range(2, side):
                left = (weights[2, column, ..., 0] * signals[:, :, y, x - 2 + column] for column in range(2))
                signals[:, :, y, x] = above[:, :, x - 2] + sum(left)
    return signals[:, :, _CUT:, _CUT:]


def ar_kernels(count: int, seed: int) -> Floats:
    """Stable kernels [count, 3, 3, 3] whose filters answer the noise of all others as strongly as the search finds.

    The last weight of each channel is 0, and the sum of all is 1, so that flat parts stay flat.
    """
    rng = numpy_rng(seed, "autoregressive kernels")
    kernels, signals = _stable(rng, max(_POOL, min(_LARGEST_POOL, _PER_LABEL * count), count))
    answers = _answers(kernels, signals)
    mutual = np.minimum(answers, answers.T)
    for least in _ANSWERS:
        apart = mutual >= least
        chosen: list[int] = []
        for candidate in np.argsort(-apart.sum(1), kind="stable"):
            if apart[candidate, chosen].all():
                chosen.append(int(candidate))
            if len(chosen) == count:
                return kernels[chosen]
    return kernels[:count]


def _stable(rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """Kernels [count, 3, 3, 3] and a signal of each of L2 norm 1; of three channels that are stable by themselves."""
    found: list[tuple[Floats, Floats]] = []
    while sum(len(kernels) for kernels, _ in found) < 3 * count:
        kernels = rng.standard_normal((4 * count, 1, 3, 3))
        kernels[..., 2, 2] = 0
        kernels /= kernels.sum((2, 3), keepdims=True)
        side = _TRIED_SIDE + _CUT
        signals = ar_signals(kernels, rng.standard_normal((len(kernels), 1, side, side)))
        with np.errstate(over="ignore", invalid="ignore"):
            is_stable = (signals**2).sum((1, 2, 3)) <= _LARGEST_NORM**2 / 3
        found.append((kernels[is_stable], signals[is_stable]))
    parts = (np.concatenate([pair[part] for pair in found])[: 3 * count] for part in (0, 1))
    kernels, signals = (part.reshape(count, 3, *part.shape[2:]) for part in parts)
    return kernels, _unit(signals)


def _answers(kernels: Floats, signals: Floats) -> Floats:
    """Sum of the positive answers of each kernel's filter to each signal, [k, k]; 0 to its own."""
    filters = ar_filters(kernels).reshape(len(kernels), -1).astype(np.float32)
    answers = np.empty((len(kernels), len(kernels)))
    for number, signal in enumerate(signals):
        windows = sliding_window_view(signal, (3, 3), (1, 2)).transpose(1, 2, 0, 3, 4).reshape(-1, filters.shape[1])
        answers[:, number] = np.maximum(windows.astype(np.float32) @ filters.T, 0).sum(0)
    return answers


def ar_filters(kernels: Floats) -> Floats:
    """The filter that answers 0 to the noise of a kernel: the kernel with -1 as its last weight."""
    filters = kernels.copy()
    filters[..., 2, 2] = -1
    return filters


def _unit(signals: Floats) -> Floats:
    """Signals [n, ...] scaled to L2 norm 1."""
    norms = np.array([math.sqrt(float((signal**2).sum())) for signal in signals])
    scaled: Floats = signals / norms.reshape(-1, *[1] * (signals.ndim - 1))
    return scaled
