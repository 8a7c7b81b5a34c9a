"""Pictures to train on: squares of the samples of a shard, decoded once; what cannot be read is left out and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import InputError, Reason, SampleError
from pipeline.pictures.members import image_suffix, rejection_of
from pipeline.pictures.picture import decode_rgb
from pipeline.records import Rejection, Sample, losses_of
from pipeline.shards.inputs import said_of


@dataclass(frozen=True)
class LeftOut:
    """Samples of a shard that could not be read: how many, and a line that names the shard and the first of them."""

    count: int
    said: str


def square_of(sample: Sample, side: int, *, max_pixels: int, keep_sidecar: Sequence[str] = ()) -> NDArray[np.uint8]:
    """The middle of a sample's picture, resized (bicubic): uint8 [side, side, 3]. Raises SampleError."""
    suffix = image_suffix(sample, keep_sidecar)
    pixels = decode_rgb(sample.members[suffix], at_least=side, max_pixels=max_pixels, suffix=suffix)
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC))


def squares_of(
    samples: Iterable[Sample | Rejection],
    wanted: Callable[[str], bool],
    rejections: list[Rejection],
    *,
    side: int,
    max_pixels: int,
) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
    """The samples whose keys are wanted, each with its square.

    rejections  is given what cannot be read of the wanted samples, and every damaged part of the shard
    """
    for sample in samples:
        if isinstance(sample, Rejection):
            if sample.reason is Reason.TRUNCATED_SHARD or wanted(sample.key):
                rejections.append(sample)
        elif wanted(sample.key):
            try:
                square = square_of(sample, side, max_pixels=max_pixels)
            except SampleError as error:
                rejections.append(rejection_of(sample, error))
                continue
            yield sample, square


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
