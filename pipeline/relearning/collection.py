"""A collection's labelled pictures as arrays, decoded once: what a trainer would load from its shards or files."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, SettingsError
from pipeline.fitting.fit_images import shorter_sides
from pipeline.hashing import derive, in_sample
from pipeline.records import Rejection, Sample, Shard
from pipeline.relearning.alignment import check_aligned
from pipeline.relearning.labels.given import Classes, given_label
from pipeline.settings import Size
from pipeline.shards.samples import samples_of, samples_of_all
from pipeline.shards.squares import LeftOut, left_out, squares_of, stacked
from pipeline.storage.store import Store

MAX_PIXELS = 100_000_000
MAX_MEMBER_BYTES = 256 * 1024 * 1024


SAME_SHARE = 0.1  # of the test images; real sets have a few copies of training images


@dataclass(frozen=True, eq=False)
class Collection:
    """A labelled collection.

    images    uint8 [n, 3, S, S]
    labels    int64 [n]
    keys      [n], unique
    left_out  the parts of its shards that could not be read
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def digest(self) -> str:
        """SHA-256 over keys, labels and pixels, in order."""
        hasher = hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape"))
        hasher.update(np.ascontiguousarray(self.labels).data)
        hasher.update(np.ascontiguousarray(self.images).data)
        return hasher.hexdigest()

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Collection:
        """The chosen rows, in the given order."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Collection(self.images[indices], self.labels[indices], tuple(self.keys[i] for i in indices))


def load_labelled(
    store: Store,
    shards: Sequence[Shard],
    *,
    side: int,
    limit: int | None = None,
    has_labels: bool = True,
    classes: Classes = MappingProxyType({}),
    size: Size = "native",
) -> Collection:
    """Every sample with an image and a label, resized to one side, in the order of shards and units of loose images.

    limit       skip samples whose key hashes above this (see smallest_hashes) without decoding them
    has_labels  False: ignore labels and set them all to 0
    classes     what labels are: see class_numbers
    size        224: load what a run with `--size 224` would store of the pictures

    Raises InputError, naming shard and key, if a shard is damaged or a sample has no label.
    """
    images, labels, keys, left = [], [], [], list[LeftOut]()

    def wanted(key: str) -> bool:
        return limit is None or _hash(key) <= limit

    for shard in shards:
        where, rejections = f"{store.url}/{shard.name}", list[Rejection]()
        samples = _samples(store, shard, wanted)
        for sample, square in squares_of(samples, wanted, rejections, side=side, max_pixels=MAX_PIXELS, size=size):
            labels.append(given_label(sample, classes, where) if has_labels else 0)
            images.append(square)
            keys.append(sample.key)
        left += left_out(where, rejections)
    return Collection(stacked(images, side), np.array(labels, np.int64), tuple(keys), tuple(left))


def _samples(
    store: Store, shard: Shard, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[Sample | Rejection]:
    """The samples of a shard, or the wanted ones of a unit of loose images; files of unwanted ones are not read."""
    if shard.images:
        images = tuple(image for image in shard.images if wanted(image.key))
        if not images:
            return
        shard = replace(shard, images=images)
    yield from samples_of(store, shard, max_member_bytes=MAX_MEMBER_BYTES, any_version=True)


def median_side(store: Store, shards: Sequence[Shard]) -> int:
    """Median shorter side in pixels of the first usable images. Raises InputError if there are none."""
    samples = samples_of_all(store, shards, max_member_bytes=MAX_MEMBER_BYTES)
    sides = shorter_sides(samples, limit=64, max_pixels=MAX_PIXELS)
    return sorted(sides)[len(sides) // 2]


def smallest_hashes(store: Store, shards: Sequence[Shard], at_most: int) -> list[int]:
    """The `at_most` smallest key hashes in some shards, ascending; no picture is decoded.

    Images whose hashes do not exceed the last one are the same in every copy of a collection, however it is sharded.
    """
    smallest: list[int] = []
    for shard in shards:
        samples = shard.images or (item for item in _samples(store, shard) if isinstance(item, Sample))
        hashes = (_hash(sample.key) for sample in samples)
        smallest = heapq.nsmallest(at_most, itertools.chain(smallest, hashes))
    return smallest


def _hash(key: str) -> int:
    return derive(0, "relearning-images", key)


def join(parts: Iterable[Collection], where: str) -> Collection:
    """Concatenate collections. Raises InputError if the result is empty or a key occurs twice."""
    parts = list(parts)
    keys = tuple(key for part in parts for key in part.keys)
    if not keys:
        raise InputError(f"{where}: no sample has both an image and a label")
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{where}: key {twice} occurs twice; keys must be unique across all shards of a collection")
    if len(parts) == 1:
        return parts[0]
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return Collection(images, labels, keys, tuple(item for part in parts for item in part.left_out))


def like_clean(protected: Collection, clean: Collection, name: str) -> NDArray[np.int64]:
    """The row of the clean collection for each protected image, int64 [n].

    Raises InputError for keys missing from the clean collection, for labels that differ, and if the images of a pair
    are not the same part of the same picture.
    """
    rows = {key: row for row, key in enumerate(clean.keys)}
    unknown = [key for key in protected.keys if key not in rows]
    if unknown:
        raise InputError(f"{name}: {len(unknown):,} of its keys are not in --clean, e.g. {unknown[0]}")
    matches = np.array([rows[key] for key in protected.keys], np.int64)
    differing = np.flatnonzero(clean.labels[matches] != protected.labels)
    if len(differing):
        first = int(differing[0])
        raise InputError(
            f"{name}: key {protected.keys[first]} has label {protected.labels[first]}, "
            f"but {clean.labels[matches[first]]} in --clean; {len(differing):,} labels differ"
        )
    check_aligned(protected.images, clean.images, matches, protected.keys, name)
    return matches


def check_classes(clean: Collection, test: Collection) -> None:
    """Raise InputError unless both collections have the same classes."""
    ours, theirs = (set(np.unique(collection.labels).tolist()) for collection in (clean, test))
    if ours != theirs:
        raise InputError(
            f"--clean has {len(ours)} classes, --test {len(theirs)}; found in only one: {sorted(ours ^ theirs)[:5]}"
        )


def check_unlike(clean: Collection, test: Collection) -> None:
    """Raise SettingsError if a tenth of the test images, or more, are among the others, pixel for pixel."""
    seen = {hashlib.blake2b(image, digest_size=16).digest() for image in np.ascontiguousarray(clean.images)}
    same = [
        key
        for key, image in zip(test.keys, np.ascontiguousarray(test.images), strict=True)
        if hashlib.blake2b(image, digest_size=16).digest() in seen
    ]
    if len(same) >= SAME_SHARE * len(test):
        raise SettingsError(
            f"--test and --clean hold the same pictures ({len(same):,} of {len(test):,}, e.g. {same[0]}): "
            "name images that no target is trained on"
        )


def holdout_mask(keys: Sequence[str], share: float, seed: int = 0) -> NDArray[np.bool_]:
    """True for the hash-sample of keys held out from training, bool [n]."""
    return np.array([in_sample(share, seed, "relearning-holdout", key) for key in keys], bool)
