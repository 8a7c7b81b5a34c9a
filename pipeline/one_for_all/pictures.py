"""Pictures to train on: squares of the samples of a shard, decoded once; what cannot be read is left out and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import InputError, SampleError
from pipeline.fingerprint import in_sample
from pipeline.fit_images import CROP_MARGIN, FIT_IMAGE
from pipeline.inputs import said_of
from pipeline.members import image_suffix
from pipeline.picture import decode_rgb
from pipeline.records import Reason, Rejection, Sample, losses_of


@dataclass(frozen=True)
class LeftOut:
    """Samples of a shard that could not be read: how many, and a line that names the shard and the first of them."""

    count: int
    said: str


def squares_of(
    samples: Iterable[Sample | Rejection],
    wanted: Callable[[str], bool],
    rejections: list[Rejection],
    *,
    side: int,
    max_pixels: int,
) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
    """The samples whose keys are wanted, each with its picture: uint8 [side, side, 3], its middle, resized (bicubic).

    rejections  is given what cannot be read of the wanted samples, and every damaged part of the shard
    """
    for sample in samples:
        if isinstance(sample, Rejection):
            if sample.reason is Reason.TRUNCATED_SHARD or wanted(sample.key):
                rejections.append(sample)
            continue
        if not wanted(sample.key):
            continue
        suffix = ""
        try:
            suffix = image_suffix(sample)
            pixels = decode_rgb(sample.members[suffix], at_least=side, max_pixels=max_pixels, suffix=suffix)
        except SampleError as error:
            rejections.append(Rejection(sample.key, suffix, error.reason, error.detail))
            continue
        yield sample, np.asarray(ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC))


def left_out(shard: str, rejections: list[Rejection]) -> tuple[LeftOut, ...]:
    """What to say of a shard that is otherwise used; nothing where all of it could be read.

    Raises InputError for a damaged shard: nobody knows what was in it.
    """
    if lost := losses_of(shard, rejections):
        raise InputError(f"{lost[0]}; restore the shard, or leave it out")
    return (LeftOut(len(rejections), f"{shard}: {said_of(rejections)}"),) if rejections else ()


def stacked(squares: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """uint8 [n, 3, side, side] of squares."""
    if not squares:
        return np.zeros((0, 3, side, side), np.uint8)
    return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))


@dataclass(frozen=True, eq=False)
class Squares:
    """uint8 [n, 3, R, R] pictures, and their labels int64 [n] or None; and what of the shard is none of them."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    left_out: tuple[LeftOut, ...] = ()


def square_side(side: int) -> int:
    """R: the generator's side and a margin to crop from, as 256 for 224 (Chen et al. 2024, released code)."""
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
    """The usable pictures of a shard, a hash-sample of about `share` of them, cut to squares of `side` pixels.

    where  what the shard is called in a message
    Raises InputError if a label is wanted and a sample has no .cls member with one, and for a damaged shard.
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
    found = np.array(labels, np.int64) if with_labels else None
    return Squares(stacked(pixels, side), found, left_out(where, rejections))


def _label(sample: Sample, where: str) -> int:
    try:
        return int(sample.members["cls"])
    except (KeyError, ValueError):
        raise InputError(f"{where}: {sample.key} has no .cls label, which --select-by label needs") from None
