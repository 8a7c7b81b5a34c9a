"""The records passed between rooms: frozen, checked when created, without computation.

Shape letters used throughout: B batch, C H W image, n rows, d feature, p clusters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.errors import Reason
from pipeline.json_record import CompactRecord, Files, JsonRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp"))  # of members that are images; lower case
_MOST_SHOWN = 4096


@dataclass(frozen=True, slots=True)
class File:
    """One file below the root of an input or output.

    version  of its content: the store's etag of an input, the SHA-256 of an output
    """

    name: str
    size: int  # bytes
    version: str


@dataclass(frozen=True, slots=True)
class LooseImage:
    """An image that is a file of its own, with its sidecars: a sample outside any tar.

    files  the image first
    """

    key: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Shard:
    """A reference to one input shard, or to a unit of loose images that is handled like one; without its bytes.

    etag    the store's version tag for the content; of a unit, a digest over its files
    images  of a unit, sorted by name; () for a shard
    """

    name: str  # relative to the input's root, and the same in the output; a unit's name is that of no file
    size: int  # bytes
    etag: str
    images: tuple[LooseImage, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith("/") or ".." in self.name.split("/"):
            raise ValueError(f"shard name leaves its prefix: {self.name!r}")


def images_to_json(images: Iterable[LooseImage]) -> str:
    """A unit's images as text, for tables and for Ray."""
    rows = [[image.key, [[file.name, file.size, file.version] for file in image.files]] for image in images]
    return json.dumps(rows, separators=(",", ":"))


def images_from_json(text: str) -> tuple[LooseImage, ...]:
    """The inverse of images_to_json."""
    return tuple(LooseImage(key, tuple(File(*file) for file in files)) for key, files in json.loads(text))


@dataclass(frozen=True)
class Plan:
    """What a run will do: every shard of the input, and which ones are already committed."""

    shards: tuple[Shard, ...]  # sorted by name
    fingerprint: str
    done: frozenset[str] = field(default_factory=frozenset)  # names with a commit

    @cached_property
    def left(self) -> tuple[Shard, ...]:
        """Shards without a commit, in plan order."""
        return tuple(shard for shard in self.shards if shard.name not in self.done)

    @property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def contents(self) -> str:
        """What there is, for people."""
        units = [shard for shard in self.shards if shard.images]
        tars = len(self.shards) - len(units)
        said = [f"{tars} shards"] if tars or not units else []
        images = sum(len(unit.images) for unit in units)
        return ", ".join(said + ([f"{images:,} loose images in {len(units):,} units"] if units else []))


@dataclass(frozen=True)
class Sample:
    """The members of a shard that share a key, in input order.

    members  suffix (what follows the first dot of the base name, e.g. "jpg", "seg.png") -> bytes
    """

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Rejection(JsonRecord):
    """One line of a quarantine file."""

    key: str
    member: str  # full member name; "" for the shard as a whole
    reason: Reason
    detail: str


def shown(name: str) -> str:
    """A name made safe for logs and JSON: at most 4,096 characters, control characters and bad UTF-8 escaped."""
    text = name[:_MOST_SHOWN].encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def losses_of(shard: str, rejections: Iterable[Rejection]) -> list[str]:
    """One line for each part of a shard that could not be read and whose contents are therefore unknown."""
    return [f"{shard}: {rejection.detail}" for rejection in rejections if rejection.reason is Reason.TRUNCATED_SHARD]


def quarantine_to_bytes(rejections: Iterable[Rejection]) -> bytes:
    """A quarantine file: one JSON object per line."""
    lines = [json.dumps(rejection.to_json(), sort_keys=True, ensure_ascii=False) for rejection in rejections]
    return ("\n".join(lines) + "\n").encode()


def quarantine_from_bytes(data: bytes, where: str) -> list[Rejection]:
    """The inverse of quarantine_to_bytes. Raises InputError, naming the line, for anything it did not write."""
    lines = enumerate(data.splitlines(), start=1)  # bytes, because str.splitlines also splits at U+2028
    return [Rejection.from_bytes(line, f"{where}, line {number},") for number, line in lines]


def read_quarantine(store: Files, name: str) -> list[Rejection]:
    """Read a quarantine file from a store. Raises InputError if it is missing or damaged."""
    return quarantine_from_bytes(store.read(name), f"{store.url}/{name}")


@dataclass(frozen=True)
class Features:
    """Embeddings of one shard's usable samples, in input order."""

    shard: str
    keys: tuple[str, ...]
    values: NDArray[np.float16]  # [n, d]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.keys) != len(self.values):
            raise ValueError(f"{self.shard}: {len(self.keys)} keys for features of shape {self.values.shape}")


@dataclass(frozen=True)
class Commit(CompactRecord):
    """The record whose existence makes a shard's output visible and final.

    output_sha256  of the shard; of a unit of loose images, over names, sizes and digests of its files
    images         of a unit: what was written; () for a shard
    """

    fingerprint: str
    shard: str
    input_size: int
    input_etag: str
    output_size: int
    output_sha256: str
    protection_sha256: str
    num_protected: int
    num_quarantined: int
    num_members: int  # members written, sidecars included
    input_image_bytes: int
    output_image_bytes: int
    max_abs_delta: int  # largest |x' - x| before encoding, in 8-bit levels
    quarantine: Mapping[str, int]  # reason -> count
    clusters: Mapping[str, int]  # cluster index -> samples protected with it
    seconds: Mapping[str, float]  # stage -> wall seconds; never compared
    # commits of earlier versions lack these
    images: tuple[LooseImage, ...] = ()
    num_finer: int = 0  # JPEGs written with finer steps or more colour than they came with, for the delta's sake
    num_reread: int = 0  # pictures decoded again after encoding
    survival: float = 0.0  # sum of the shares of their deltas that were left

    def written(self) -> Shard:
        """What it describes, to be read from the output."""
        return Shard(self.shard, self.output_size, self.output_sha256, self.images)

    def agrees_with(self, other: Commit) -> bool:
        """True if both describe the same output bytes made from the same input under the same fingerprint."""
        return (self.fingerprint, self.shard, self.input_etag, self.output_sha256) == (
            other.fingerprint,
            other.shard,
            other.input_etag,
            other.output_sha256,
        )
