"""Training pictures: square crops of a shard's samples, decoded once; unreadable samples are left out and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import InputError, Reason, SampleError
from pipeline.pictures.members import image_suffix, rejection_of
from pipeline.pictures.picture import decode, decode_rgb, resize_and_crop
from pipeline.records import Rejection, Sample, losses_of
from pipeline.settings import Size
from pipeline.shards.inputs import said_of


@dataclass(frozen=True)
class LeftOut:
    """Samples of a shard that could not be read.

    said  a line that names the shard and the first of them
    """

    count: int
    said: str


def square_of(
    sample: Sample, side: int, *, max_pixels: int, keep_sidecar: Sequence[str] = (), size: Size = "native"
) -> NDArray[np.uint8]:
    """The central square of a sample's picture, resized bicubically: uint8 [side, side, 3]. Raises SampleError.

    size  224: the central square of what a run with `--size 224` stores of it
    """
    suffix = image_suffix(sample, keep_sidecar)
    data = sample.members[suffix]
    if size == "224":
        pixels = resize_and_crop(decode(data, max_pixels=max_pixels, suffix=suffix)).rgb
    else:
        pixels = decode_rgb(data, at_least=side, max_pixels=max_pixels, suffix=suffix)
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC))


def squares_of(
    samples: Iterable[Sample | Rejection],
    wanted: Callable[[str], bool],
    rejections: list[Rejection],
    *,
    side: int,
    max_pixels: int,
    size: Size = "native",
) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
    """Samples with a wanted key, each with its square.

    size        see square_of
    rejections  receives wanted samples that cannot be read, and every damaged part of the shard
    """
    for sample in samples:
        if isinstance(sample, Rejection):
            if sample.reason is Reason.TRUNCATED_SHARD or wanted(sample.key):
                rejections.append(sample)
        elif wanted(sample.key):
            try:
                square = square_of(sample, side, max_pixels=max_pixels, size=size)
            except SampleError as error:
                rejections.append(rejection_of(sample, error))
                continue
            yield sample, square


def left_out(shard: str, rejections: list[Rejection]) -> tuple[LeftOut, ...]:
    """A summary of what could not be read of a shard; empty if everything could.

    Raises InputError for a damaged shard, whose lost contents are unknown.
    """
    if lost := losses_of(shard, rejections):
        raise InputError(f"{lost[0]}; restore the shard or remove it")
    return (LeftOut(len(rejections), f"{shard}: {said_of(rejections)}"),) if rejections else ()


def stacked(squares: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """Stack squares into uint8 [n, 3, side, side]."""
    if not squares:
        return np.zeros((0, 3, side, side), np.uint8)
    return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))
