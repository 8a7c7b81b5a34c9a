"""The pictures a universal generator is trained on: squares from one shard, and their labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.fitting.fit_images import CROP_MARGIN, FIT_IMAGE
from pipeline.hashing import in_sample
from pipeline.records import Rejection, Sample
from pipeline.shards.squares import LeftOut, left_out, squares_of, stacked


@dataclass(frozen=True, eq=False)
class Squares:
    """Training squares.

    pixels    uint8 [n, 3, R, R]
    labels    int64 [n], or None
    left_out  parts of the shard that could not be used
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    left_out: tuple[LeftOut, ...] = ()


def square_side(side: int) -> int:
    """R: the generator's side plus a margin for cropping, such as 256 for 224 (Chen et al. 2024, released code)."""
    return round(side * CROP_MARGIN)


def read_squares(
    samples: Iterable[Sample | Rejection],
    shard: str,
    where: str,
    *,
    side: int,
    share: float,
    seed: int,
    max_pixels: int,
    with_labels: bool,
) -> Squares:
    """A hash-sample of about `share` of a shard's usable pictures, as squares of `side` pixels.

    where  name of the shard in messages
    Raises InputError for a missing .cls label if `with_labels`, and for a damaged shard.
    """
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    rejections: list[Rejection] = []

    def wanted(key: str) -> bool:
        return in_sample(share, seed, FIT_IMAGE, shard, key)

    for sample, square in squares_of(samples, wanted, rejections, side=side, max_pixels=max_pixels):
        if with_labels:
            labels.append(_label(sample, where))
        pixels.append(square)
    classes = np.array(labels, np.int64) if with_labels else None
    return Squares(stacked(pixels, side), classes, left_out(where, rejections))


def _label(sample: Sample, where: str) -> int:
    try:
        label = int(sample.members["cls"])
    except (KeyError, ValueError):
        raise InputError(f"{where}: {sample.key} has no .cls label, which --select-by label needs") from None
    if label < 0:
        raise InputError(f"{where}: {sample.key} has the label {label}; --select-by label needs rows from 0 on")
    return label
