"""Loose images as samples: which files belong together, and the units that they are handled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter
from typing import TypeVar

from pipeline.hashing import canonical, sha256
from pipeline.pictures.members import TEXT_SUFFIXES
from pipeline.records import File, LooseImage, Shard
from pipeline.shards.names import extension_of, fault_of, is_image, stem_of
from pipeline.storage.listings import Entry

UNIT_IMAGES = (16, 512)  # fewest and most in a unit: small collections still occupy several workers
UNIT_BYTES = 128 << 20  # at most, unless a single image is larger
_UNITS_WANTED = 64

_T = TypeVar("_T")


def kept_suffixes(keep: Collection[str]) -> tuple[str, ...]:
    """Endings of the names, in lower case, of files that are sidecars, whatever they hold."""
    return tuple(f".{suffix.lower()}" for suffix in keep)


def loose_images(entries: Iterable[Entry], keep: Collection[str] = ()) -> tuple[list[LooseImage], list[str]]:
    """Images with their sidecars, sorted by name, and the names of files that are neither.

    keep  suffixes of further sidecars, such as seg.png; a file with one of them is no image of its own

    The key is the image's path without its extension, as in a tar of the same files; images that would share a key
    (a.jpg, a.png) have their full names as keys. A sidecar is a text file called after an image (a.cls, a.jpg.json),
    or a file with a suffix of `keep`; one called after several images belongs to the first of them.
    """
    kept = kept_suffixes(keep)
    images, rest = list[Entry](), list[Entry]()
    for entry in sorted(entries):
        is_own = is_image(entry.name) and not entry.name.lower().endswith(kept)
        (images if is_own else rest).append(entry)
    owners: dict[str, int] = {}  # full name, and key -> index of the image
    shared: set[str] = set()
    for number, entry in enumerate(images):
        owners[entry.name] = number
        stem = stem_of(entry.name)
        if owners.setdefault(stem, number) != number:
            shared.add(stem)
    sidecars: dict[int, list[Entry]] = {}
    others = []
    for entry in rest:
        is_sidecar = extension_of(entry.name) in TEXT_SUFFIXES or entry.name.lower().endswith(kept)
        owner = _owner(entry.name, owners) if is_sidecar and fault_of(entry.name) is None else None
        if owner is None:
            others.append(entry.name)
        else:
            sidecars.setdefault(owner, []).append(entry)
    found = []
    for number, entry in enumerate(images):
        stem = stem_of(entry.name)
        files = tuple(File(*one[:3]) for one in (entry, *sidecars.get(number, ())))
        found.append(LooseImage(entry.name if stem in shared else stem, files))
    return found, others


def _owner(name: str, owners: dict[str, int]) -> int | None:
    """Index of the image that a file is called after: a.seg.json belongs to a.seg.jpg, else to a.jpg."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        owner = owners.get(folder + slash + base) if base else None
        if owner is not None:
            return owner
    return None


def units_of_images(images: Collection[LooseImage]) -> list[Shard]:
    """Units of loose images, in order, by count and bytes: the same images always make the same units."""
    fewest, most = UNIT_IMAGES
    count = min(most, max(fewest, math.ceil(len(images) / _UNITS_WANTED)))
    parts = grouped(images, attrgetter("size"), first=count, most=count, most_bytes=UNIT_BYTES)
    return [_unit(number, part) for number, part in enumerate(parts)]


def _unit(number: int, images: tuple[LooseImage, ...]) -> Shard:
    files = [[image.key, *([file.name, file.size, file.version] for file in image.files)] for image in images]
    version = sha256(canonical(files))[:32]
    return Shard(f"images-{number:07d}", sum(image.size for image in images), version, images)


def grouped(
    items: Iterable[_T],
    size_of: Callable[[_T], int],
    *,
    first: int,
    most: int,
    most_bytes: int,
    is_alone: Callable[[_T], bool] = lambda _: False,
) -> Iterator[tuple[_T, ...]]:
    """Groups of `first`, 2 * first, … up to `most` items and `most_bytes` bytes (or one item), in order.

    is_alone  True for an item that is a group of its own, yielded at once
    A group is yielded as soon as it is full, so no more than one group of `items` is held.
    """
    limit, size = first, 0
    waiting: list[_T] = []
    for item in items:
        if is_alone(item):
            yield (item,)
            continue
        if waiting and size + size_of(item) > most_bytes:
            yield tuple(waiting)
            waiting, size, limit = [], 0, min(2 * limit, most)
        waiting.append(item)
        size += size_of(item)
        if len(waiting) >= limit:
            yield tuple(waiting)
            waiting, size, limit = [], 0, min(2 * limit, most)
    if waiting:
        yield tuple(waiting)
