"""Groups of new objects that are protected and committed together; the first are small, for early progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from pipeline.errors import Reason
from pipeline.hashing import canonical, sha256
from pipeline.shards.loose import grouped
from pipeline.uploads.names import SHARD


@dataclass(frozen=True)
class Item:
    """An object to protect.

    version  of its row in the ledger: 1 for the first, incremented with every change
    fault    why it is quarantined unread, or None
    """

    name: str
    size: int  # bytes
    etag: str
    kind: str  # IMAGE or SHARD
    version: int = 1
    fault: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class Unit:
    """Loose images, or one shard: the unit of work, of retry and of commit."""

    items: tuple[Item, ...]

    @cached_property
    def id(self) -> str:
        """Digest of its items: runs that take the same step from the same ledger commit under the same name."""
        return sha256(canonical([[item.name, item.etag, item.version] for item in self.items]))[:32]

    @property
    def is_shard(self) -> bool:
        return self.items[0].kind == SHARD


def units_of(items: Iterable[Item], *, max_images: int, max_bytes: int) -> Iterator[Unit]:
    """Units of 1, 2, 4, … up to `max_images` images and `max_bytes` bytes (or one image); every shard is its own unit.

    A unit is yielded as soon as it is full, so no more than one unit of `items` is held.
    """
    groups = grouped(
        items,
        attrgetter("size"),
        first=1,
        most=max_images,
        most_bytes=max_bytes,
        is_alone=lambda item: item.kind == SHARD,
    )
    return map(Unit, groups)
