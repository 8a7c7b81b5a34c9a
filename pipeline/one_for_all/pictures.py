"""The pictures that a universal generator is trained on: squares of one shard, decoded once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import InputError, SampleError
from pipeline.fingerprint import in_sample
from pipeline.fit_images import CROP_MARGIN, FIT_IMAGE
from pipeline.members import image_suffix
from pipeline.picture import decode_rgb
from pipeline.records import Rejection, Sample


@dataclass(frozen=True, eq=False)
class Squares:
    """uint8 [n, 3, R, R] pictures, and their labels int64 [n] or None."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


def square_side(side: int) -> int:
    """R: the generator's side and a margin to crop from, as 256 for 224 (Chen et al. 2024, released code)."""
    return round(side * CROP_MARGIN)


def read_squares(
    samples: Iterable[Sample | Rejection],
    shard: str,
    *,
    side: int,
    share: float,
    seed: int,
    max_pixels: int,
    with_labels: bool,
) -> Squares:
    """The usable pictures of a shard, a hash-sample of about `share` of them, cut to squares of `side` pixels.

    Raises InputError if a label is wanted and a sample has no .cls member with one.
    """
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for sample in samples:
        if isinstance(sample, Rejection) or not in_sample(share, seed, FIT_IMAGE, shard, sample.key):
            continue
        try:
            suffix = image_suffix(sample)
            found = decode_rgb(sample.members[suffix], at_least=side, max_pixels=max_pixels, suffix=suffix)
        except SampleError:
            continue
        if with_labels:
            labels.append(_label(sample, shard))
        pixels.append(np.asarray(ImageOps.fit(Image.fromarray(found), (side, side), Image.Resampling.BICUBIC)))
    stacked = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)
    return Squares(
        np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)), np.array(labels, np.int64) if with_labels else None
    )


def _label(sample: Sample, shard: str) -> int:
    try:
        return int(sample.members["cls"])
    except (KeyError, ValueError):
        raise InputError(f"{shard}: {sample.key} has no .cls label, which --select-by label needs") from None
