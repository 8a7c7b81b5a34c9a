"""One-pixel shortcut (OPS): all pictures of a label have one pixel at one place in one colour."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from pipeline.baselines.base import NO_FIGURES, BaselineSettings, Bound, LabelledPictures, Told

COLOURS = np.array(list(itertools.product((0, 1), repeat=3)), np.float64)  # the corners of the cube, [8, 3]


class OnePixel:
    """For each label the place and the colour that most of its pictures are farthest from; no pair is used twice.

    A single pixel survives no resizing, and nothing bounds it.
    """

    per_sample = True  # a pixel is set, so the delta depends on what was there
    bound: Bound = "none"
    figures = NO_FIGURES
    source = "one-pixel shortcut: Wu et al., ICLR 2023, algorithm 1, sparsity 1, as in their code"

    def deltas(self, pictures: LabelledPictures, settings: BaselineSettings, told: Told) -> NDArray[np.int16]:
        """As Baseline.deltas: int16 [n, 3, S, S]."""
        side, taken = pictures.images.shape[-1], set[int]()
        levels = np.zeros(pictures.images.shape, np.int16)
        for label in range(pictures.num_labels):
            rows = np.flatnonzero(pictures.labels == label)
            ranked = np.argsort(-one_pixel_scores(pictures.images[rows]).ravel(), kind="stable")
            chosen = next(int(index) for index in ranked if int(index) not in taken)
            taken.add(chosen)
            colour, place = divmod(chosen, side * side)
            row, column = divmod(place, side)
            before = pictures.images[rows, :, row, column].astype(np.int16)
            levels[rows, :, row, column] = (255 * COLOURS[colour]).astype(np.int16) - before
            told((label + 1) / pictures.num_labels)
        return levels


def one_pixel_scores(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean over standard deviation of |colour - pixel|, over pictures [n, 3, S, S] and channels: [8, S, S].

    Without deviation a colour is as good as can be, unless it changes nothing.
    """
    count, total, squares = len(images), *(np.zeros(images.shape[1:]) for _ in range(2))
    for picture in images:  # one at a time: as floats, all take eight times their memory
        values = picture / 255
        total += values
        squares += values**2
    first, second = total / count, squares / count
    # |c - x| is x or 1 - x in each channel
    distance = np.stack([np.where(colour[:, None, None] == 1, 1 - first, first) for colour in COLOURS]).mean(1)
    energy = np.stack([np.where(c[:, None, None] == 1, 1 - 2 * first + second, second) for c in COLOURS]).mean(1)
    deviation = np.sqrt(np.maximum(energy - distance**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores: NDArray[np.float64] = np.nan_to_num(distance / deviation, nan=0.0, posinf=np.inf)
    return scores
