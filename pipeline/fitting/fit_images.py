"""The images deltas are fitted on, and their size: a deterministic hash-sample, decoded once to uint8.

The processes that read them start without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError, SampleError
from pipeline.hashing import in_sample
from pipeline.pictures.members import image_suffix, open_sample
from pipeline.pictures.picture import decode, squeezed
from pipeline.records import Rejection, Sample
from pipeline.settings import Settings
from pipeline.shards.squares import square_of
from pipeline.surrogates.features import Assignment

LEAST_PER_CLUSTER = 200  # a pattern seen on fewer images is not learnt before the real features
FIT_IMAGE = "fit-image"  # purpose of the hash-sample
CROP_MARGIN = 256 / 224  # pictures are kept this much larger if the fit crops them at random, as in UC


def fit_shares(sizes: Mapping[int, int], fit_images: int | None) -> dict[int, float]:
    """Share of each cluster's images to fit on: equal, except that small clusters provide at least 200 images.

    sizes       cluster -> number of images
    fit_images  total number to fit on; None = all
    """
    total = sum(sizes.values())
    common = 1.0 if fit_images is None else min(1.0, fit_images / max(total, 1))
    return {cluster: max(common, min(1.0, LEAST_PER_CLUSTER / max(size, 1))) for cluster, size in sizes.items()}


def chosen_images(assignment: Assignment, shares: Mapping[int, float], seed: int) -> dict[str, int]:
    """Key -> cluster of each sample of a shard to fit on, without reading the shard."""
    clusters = zip(assignment.keys, assignment.clusters.tolist(), strict=True)
    return {
        key: cluster for key, cluster in clusters if in_sample(shares[cluster], seed, FIT_IMAGE, assignment.shard, key)
    }


def read_fit_images(
    samples: Iterable[Sample | Rejection],
    chosen: Mapping[str, int],
    *,
    side: int,
    settings: Settings,
    whole: bool = False,
) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
    """Chosen pictures of one shard as (key, uint8 [side, side, 3], cluster), in input order.

    whole  squeeze the picture that will be written into the square, as a delta is laid over it; else cut its centre
    Reading stops after the last one: in a large collection, most shards contain few.
    """
    left = dict(chosen)
    for sample in samples if left else ():
        if isinstance(sample, Rejection) or sample.key not in left:
            continue
        if whole:
            square = squeezed(open_sample(sample, settings=settings).picture, side)
        else:
            square = square_of(sample, side, max_pixels=settings.max_pixels, keep_sidecar=settings.keep_sidecar)
        yield sample.key, square, left.pop(sample.key)
        if not left:
            return


def fit_bytes(images: int, side: int) -> int:
    """Memory of so many pictures to fit on, in each process that fits: uint8 [n, 3, side, side]."""
    return images * 3 * side * side


def stacked_pictures(
    tables: Iterable[pa.Table], *, side: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[tuple[str, str]]]:
    """Pictures from tables with the columns pixels (bytes), cluster, shard and key, sorted by (shard, key).

    Returns pictures uint8 [n, 3, side, side], clusters int64 [n], and the (shard, key) of each. Beside the tables it
    takes the memory of the pictures once. Raises InputError if there are none.
    """
    tables = list(tables)
    rows = [
        (shard, key, number, row)
        for number, table in enumerate(tables)
        for row, (shard, key) in enumerate(zip(*(table[name].to_pylist() for name in ("shard", "key")), strict=True))
    ]
    if not rows:
        raise InputError("none of the collection's images could be decoded, so there is nothing to fit deltas on")
    rows.sort()
    pixels = np.empty((len(rows), 3, side, side), np.uint8)
    clusters = np.empty(len(rows), np.int64)
    for place, (_, _, number, row) in enumerate(rows):
        picture = tables[number]["pixels"][row].as_py()
        pixels[place] = np.frombuffer(picture, np.uint8).reshape(side, side, 3).transpose(2, 0, 1)
        clusters[place] = tables[number]["cluster"][row].as_py()
    return pixels, clusters, [(shard, key) for shard, key, _, _ in rows]


def shorter_sides(samples: Iterable[Sample | Rejection], *, limit: int, max_pixels: int) -> list[int]:
    """Shorter sides in pixels of the first `limit` usable pictures. Raises InputError if there are none."""
    sides: list[int] = []
    for sample in samples:
        if isinstance(sample, Rejection):
            continue
        try:
            suffix = image_suffix(sample)
            picture = decode(sample.members[suffix], max_pixels=max_pixels, suffix=suffix)
        except SampleError:
            continue
        sides.append(min(picture.pixels.shape[:2]))
        if len(sides) == limit:
            break
    if not sides:
        raise InputError("no sample contains an image that can be decoded")
    return sides


def picture_side(settings: Settings, delta_side: int) -> int:
    """Side of the pictures that deltas of side `delta_side` are fitted on.

    For generator networks they are larger than the delta, to allow the random crop of the authors' code (256 to 224);
    otherwise picture and delta are cropped and flipped together.
    """
    crops = settings.optimise_through == "surrogate" and settings.generator == "network"
    return int(delta_side * CROP_MARGIN) if crops else delta_side
