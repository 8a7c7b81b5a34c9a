"""A published protection over a collection: pictures and labels in, checked deltas and the protection out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.baselines.base import Baseline, BaselineSettings, LabelledPictures, Told
from pipeline.baselines.settings import BaselineRunSettings
from pipeline.clusters.clustering import Clustering
from pipeline.deltas.delta import levels_of
from pipeline.deltas.keyed import KeyedDeltas
from pipeline.deltas.protection import Protection
from pipeline.errors import PromiseError
from pipeline.fitting.fit_images import fit_bytes, stacked_pictures
from pipeline.hashing import canonical, sha256
from pipeline.settings import NO_BOUND

LARGEST_SIDE = 224  # of deltas, unless --delta-size says otherwise
_COPIES = 12  # bytes for each of the pictures: a few times themselves, levels of 16 bits, deltas as floats
_LICENCE = "computed from the collection's own images and labels: their terms apply to this file"


@dataclass(frozen=True)
class ShardedPictures:
    """The pictures of a collection, sorted by shard and key, and the shard of each."""

    pictures: LabelledPictures
    shards: tuple[str, ...]


def baseline_side(settings: BaselineRunSettings, shorter_sides: list[int]) -> int:
    """Side of deltas in pixels: that of the pictures, so that the method finds what it was published for.

    shorter_sides  of some pictures
    """
    if settings.delta_size is not None:
        return settings.delta_size
    median = sorted(shorter_sides)[len(shorter_sides) // 2]
    return LARGEST_SIDE if settings.size == "224" else min(LARGEST_SIDE, median)


def baseline_bytes(images: int, side: int) -> int:
    """About how much memory so many pictures and their deltas take while they are fitted."""
    return _COPIES * fit_bytes(images, side)


def sharded_pictures(tables: Iterable[pa.Table], *, side: int) -> ShardedPictures:
    """Pictures from tables as in fit_images_from."""
    images, labels, names = stacked_pictures(tables, side=side)
    keys = tuple(key for _, key in names)
    return ShardedPictures(LabelledPictures(images, labels, keys), tuple(shard for shard, _ in names))


def checked_deltas(
    method: Baseline, pictures: LabelledPictures, num_labels: int, settings: BaselineSettings, told: Told
) -> NDArray[np.int16]:
    """The deltas of a method: int16 [n, 3, S, S], or [num_labels, 3, S, S].

    num_labels  of the collection; the method sees only those that occur, numbered from 0
    Raises PromiseError if the method breaks its own promises.
    """
    present, dense = np.unique(pictures.labels, return_inverse=True)
    seen = LabelledPictures(pictures.images, dense.astype(np.int64), pictures.keys)
    levels = method.deltas(seen, settings, told)
    count, side = len(seen.keys) if method.per_sample else len(present), pictures.images.shape[-1]
    if levels.shape != (count, 3, side, side) or levels.dtype != np.int16:
        raise PromiseError(f"deltas are {levels.dtype} {levels.shape}, not int16 {(count, 3, side, side)}")
    largest = max(int(levels.max(initial=0)), -int(levels.min(initial=0)))
    if largest > levels_of(settings.epsilon):
        raise PromiseError(f"a delta has {largest} levels; the bound is {levels_of(settings.epsilon)}")
    if method.per_sample:
        return levels
    unmoved = present[~levels.any(axis=(1, 2, 3))]
    if len(unmoved):
        raise PromiseError(f"the delta of label {unmoved[0]} changes nothing: fit it on more pictures of that label")
    whole = np.zeros((num_labels, 3, side, side), np.int16)
    whole[present] = levels
    return whole


def largest_change(levels: NDArray[np.int16]) -> float:
    """The smallest epsilon that bounds the deltas; NO_BOUND where it would be beyond what an epsilon may be."""
    largest = max(1, int(levels.max(initial=0)), -int(levels.min(initial=0)))
    return largest / 255 if largest <= 127 else NO_BOUND


def keyed_by_shard(found: ShardedPictures, levels: NDArray[np.int16], epsilon: float) -> dict[str, KeyedDeltas]:
    """The deltas of every shard's samples, from those of all."""
    keyed = {}
    for shard, rows in groupby(range(len(found.shards)), key=found.shards.__getitem__):
        chosen = list(rows)
        keyed[shard] = KeyedDeltas([found.pictures.keys[row] for row in chosen], levels[chosen], epsilon)
    return keyed


def baseline_protection(
    settings: BaselineRunSettings,
    clustering: Clustering,
    *,
    epsilon: float,
    surrogate_id: str,
    fingerprint: str,
    levels: NDArray[np.int16] | None = None,
    digests: Mapping[str, str],
    figures: Mapping[str, Any],
) -> Protection:
    """The protection of a run.

    epsilon  bound on |delta|, which of a method with a budget of its own is what came out
    levels   of each label, if its pictures share them
    digests  shard -> SHA-256 of its keyed deltas; empty if pictures share them
    """
    figures = {"labels": settings.labels, **figures}
    if digests:
        figures["deltas_sha256"] = sha256(canonical(sorted(digests.items())))
    return Protection(
        method=settings.method,
        generator="keyed" if levels is None else "direct",
        surrogate_id="" if levels is None or settings.labels != "cluster" else surrogate_id,
        epsilon=epsilon,
        clustering=clustering,
        targets=(),
        levels=None if levels is None else levels.astype(np.int8),
        fingerprint=fingerprint,
        licence=_LICENCE,
        size=settings.size,
        figures=figures,
    )
