"""Packing one shard, in five steps; killed at any point and run again, it gives the same output.

1 done if a commit exists           4 put the shard and, if any, its quarantine
2 read the images of its rows       5 create the commit, or compare with the one that is there
3 write them to local scratch, with label and JSON, hashing
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import layout
from pipeline.errors import ConflictError
from pipeline.hashing import canonical, sha256
from pipeline.json_record import CompactRecord, JsonRecord
from pipeline.packing.items import Content, DataSource, PackItem
from pipeline.records import IMAGE_SUFFIXES, Rejection, Sample, Shard, quarantine_to_bytes
from pipeline.shards.scratch import scratch_for
from pipeline.shards.tar import ShardWriter
from pipeline.storage.store import Store


@dataclass(frozen=True)
class PackIngredients:
    """Everything that decides the bytes that a run of `pack` or `unpack` writes."""

    settings: Mapping[str, Any]
    plan_sha256: str
    versions: Mapping[str, str]  # of the libraries that write something themselves


@dataclass(frozen=True)
class PackRecord(JsonRecord):
    """What a run packs, and what decides it: the record by which a second start knows its own output."""

    fingerprint: str
    ingredients: PackIngredients
    input: str
    num_shards: int

    @classmethod
    def of(cls, ingredients: PackIngredients, source: str, num_shards: int) -> PackRecord:
        """The record of a planned run."""
        return cls(sha256(canonical(asdict(ingredients))), ingredients, source, num_shards)


@dataclass(frozen=True)
class PackCommit(CompactRecord):
    """The record whose existence makes a packed shard final."""

    fingerprint: str
    shard: str
    output_size: int
    output_sha256: str
    num_images: int
    num_quarantined: int
    image_bytes: int
    quarantine: Mapping[str, int]  # reason -> count
    seconds: float  # never compared

    def created(self, output: Store) -> PackCommit:
        """This commit, created. Raises ConflictError if another run has committed different bytes for the shard."""
        if not output.create(layout.pack_commit(self.shard), self.to_bytes()):
            other = PackCommit.read(output, layout.pack_commit(self.shard))
            if other is not None and (self.fingerprint, self.output_sha256) != (other.fingerprint, other.output_sha256):
                raise ConflictError(
                    f"{self.shard}: committed with SHA-256 {other.output_sha256[:16]}, but made here with "
                    f"{self.output_sha256[:16]}: two runs disagree; compare the library versions of the workers"
                )
        return self


@dataclass(frozen=True)
class Packing:
    """What every worker needs to pack any shard of a run: the rows are in the plan's file, a row group per shard."""

    source: DataSource
    output: Store
    fingerprint: str
    classes: tuple[str, ...]

    def committed(self, shard: Shard) -> PackCommit | None:
        """Step 1: the commit of a shard, or None if it is not done."""
        return PackCommit.read(self.output, layout.pack_commit(shard.name))

    def run(self, shard: Shard) -> PackCommit:
        """All steps; the etag of `shard` is its number in the plan.

        Raises InputError (changed-input) if a file is not the version that was planned, ConflictError if another run
        has committed different bytes, StoreError if there is no room in scratch.
        """
        if (existing := self.committed(shard)) is not None:
            return existing
        started = time.perf_counter()
        with self.output.open(layout.PACK_PLAN) as plan:
            rows = pq.ParquetFile(plan).read_row_group(int(shard.etag)).to_pydict()
        with scratch_for(shard) as scratch:
            with ShardWriter(scratch / "shard", compressed=False) as writer:
                rejections, image_bytes = self._write(rows, writer)
            self.output.put_file(shard.name, scratch / "shard")
        if rejections:
            self.output.put(layout.pack_quarantine(shard.name), quarantine_to_bytes(rejections))
        commit = PackCommit(
            fingerprint=self.fingerprint,
            shard=shard.name,
            output_size=writer.size,
            output_sha256=writer.sha256,
            num_images=len(rows["path"]) - len(rejections),
            num_quarantined=len(rejections),
            image_bytes=image_bytes,
            quarantine=counted(rejections),
            seconds=time.perf_counter() - started,
        )
        return commit.created(self.output)

    def _write(self, rows: Mapping[str, Sequence[Any]], writer: ShardWriter) -> tuple[list[Rejection], int]:
        """Write the samples; returns what was refused, and the bytes of all images."""
        items = list(map(PackItem, *(rows[name] for name in PackItem._fields)))
        rejections, image_bytes = list[Rejection](), 0
        for item, key, label, content in zip(
            items, rows["key"], rows["label"], self.source.contents(items), strict=True
        ):
            if isinstance(content, Rejection):
                rejections.append(content)
                continue
            writer.write(Sample(key, self._members(item, label, content)))
            image_bytes += len(content.data)
        return rejections, image_bytes

    def _members(self, item: PackItem, label: int, content: Content) -> dict[str, bytes]:
        """The image, its label, its caption, and where it is from; the last in the words of `unpack`."""
        has_name = item.path.rpartition(".")[2].lower() in IMAGE_SUFFIXES
        about = {**content.about, "path": item.path if has_name else f"{item.path}.{content.suffix}"}
        members = {content.suffix: content.data}
        if label >= 0:
            members["cls"] = b"%d" % label
            about["class"] = self.classes[label]
        if content.text is not None:
            members["txt"] = content.text.encode()
        members["json"] = canonical(about)
        return members


def counted(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Rejections by reason."""
    return dict(sorted(Counter(one.reason.value for one in rejections).items()))


def pack_commits(output: Store, shards: Sequence[Shard]) -> Iterator[PackCommit]:
    """The commits of shards. Raises InputError for one that is missing or damaged."""
    for shard in shards:
        name = layout.pack_commit(shard.name)
        yield PackCommit.from_bytes(output.read(name), f"{output.url}/{name}")
