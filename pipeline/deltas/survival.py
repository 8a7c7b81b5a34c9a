"""How much of a delta an encoded file keeps, and how a JPEG must be coded to keep enough."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.delta import LaidDelta
from pipeline.errors import PromiseError
from pipeline.pictures.jpeg import JpegCoding, decode_pixels, encode_pixels, jpeg_header

ENOUGH = 0.97  # share of a delta that is to be left in a JPEG
FINER = (85, 90, 95)  # qualities whose tables are tried where a file's own keep less
_SIDE = 128  # pixels a side of the part of a delta that is tried
_MIDDLE = 128  # grey level that it is tried on


def survival(before: NDArray[np.uint8], protected: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """The share of a delta's energy that is left along the delta: 1 = all, 0 = nothing or only what is across it.

    before     pixels of the original, uint8 [H, W, C]
    protected  the same with the delta, before encoding
    decoded    the same read back from the file
    Returns nan if nothing changed.
    """
    whole, left, lost = (
        cv2.norm(one, other, cv2.NORM_L2SQR)  # whole numbers, exact far beyond any picture's size
        for one, other in ((protected, before), (decoded, before), (protected, decoded))
    )
    return (whole + left - lost) / (2 * whole) if whole else float("nan")  # the scalar product by three distances


def coding_for(laid: LaidDelta, coding: JpegCoding) -> JpegCoding:
    """The first of these that keeps ENOUGH of a delta: a file's own coding, and ones with ever finer steps.

    Where colour is subsampled and the delta has colour, each is tried without subsampling as well. If none keeps
    enough, the last is returned, the finest. What is tried is the delta alone, on plain grey: where a picture was coded
    with the same steps, what they leave of a delta hardly depends on the picture.
    """
    found = laid.codings.get(coding)
    if found is None:
        found = laid.codings[coding] = _chosen(laid.patch(_SIDE), coding)
    return found


def finer_jpegs(count: int) -> str:
    """A warning that counts the JPEGs whose own coding was not kept."""
    return (
        f"{count:,} JPEGs are coded more finely than the originals, whose coding would have left less than "
        f"{ENOUGH:.0%} of the delta"
    )


def _chosen(levels: NDArray[np.int16], coding: JpegCoding) -> JpegCoding:
    if len(coding.tables) == 1:
        levels = np.rint(levels.mean(axis=2, keepdims=True)).astype(np.int16)  # as it is added to grey pictures
    tried = coding
    for tried in _ladder(coding, has_colour=bool((levels != levels[:, :, :1]).any())):
        if _left(levels, tried) >= ENOUGH:
            break
    return tried


def _ladder(coding: JpegCoding, *, has_colour: bool) -> Iterator[JpegCoding]:
    for steps in (coding, *(coding.finer(quality) for quality in FINER)):
        yield steps
        if has_colour and steps.unsampled != steps:
            yield steps.unsampled


def _left(levels: NDArray[np.int16], coding: JpegCoding) -> float:
    """Survival of levels [h, w, C] on plain grey; 1 if they are all 0."""
    plain = np.full(levels.shape, _MIDDLE, np.uint8)
    changed = (plain + levels).clip(0, 255).astype(np.uint8)
    data = encode_pixels(changed, coding)
    header = jpeg_header(data)
    decoded = None if header is None else decode_pixels(data, header)
    if decoded is None:
        raise PromiseError("a JPEG written here cannot be read back; reinstall pillow, opencv and simplejpeg")
    share = survival(plain, changed, decoded)
    return 1.0 if np.isnan(share) else share
