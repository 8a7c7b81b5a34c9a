"""What is packed into which shard: every image of a source, chosen, labelled, ordered and cut, as one table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError, Reason, SettingsError
from pipeline.hashing import canonical, hash_sample, numpy_rng, sha256
from pipeline.packing.items import DataSource, LeftOutItems, PackItem
from pipeline.packing.labels import read_classes
from pipeline.packing.settings import PackSettings
from pipeline.records import Shard
from pipeline.storage.listings import Entry

_BATCH = 10_000  # rows that are Python objects at a time
_BLOCK = 1000  # neighbouring rows that stay together where only that is cheap to read
_SAMPLE_BYTES = 3 * 1024  # of headers, padding, label and JSON, besides the image
_ROWS = pa.schema(
    {
        "path": pa.string(),
        "class_name": pa.string(),
        "size": pa.int64(),
        "file": pa.string(),
        "etag": pa.string(),
        "at": pa.int64(),
    }
)


@dataclass(frozen=True)
class PackPlan:
    """The rows of all shards, in order.

    rows     path, class_name, size, file, etag, at of each PackItem, its key, and its label (-1: none)
    ends     end of each shard in the rows
    classes  names by label
    sha256   digest of all of it
    """

    rows: pa.Table
    ends: tuple[int, ...]
    classes: tuple[str, ...]
    left: LeftOutItems
    sha256: str
    shards: tuple[Shard, ...]

    @property
    def image_bytes(self) -> int:
        return int(pc.sum(self.rows["size"]).as_py() or 0)

    def of_shard(self, number: int) -> pa.Table:
        """The rows of one shard."""
        start = self.ends[number - 1] if number else 0
        return self.rows.slice(start, self.ends[number] - start)


def plan_pack(source: DataSource, settings: PackSettings, beside: Sequence[Entry] = ()) -> PackPlan:
    """List a source and decide what goes where. Raises InputError if nothing is left, SettingsError for a class.

    beside  files of the input that the source does not read
    """
    left = LeftOutItems(settings.max_member_bytes)
    left.beside(beside, "the files that are packed")
    table = _distinct(_listed(source.items(left)), left)
    if not len(table):
        lost = f"; {len(left.rejections):,} cannot be packed" if left.rejections else ""
        raise InputError(f"{settings.input}: no images (jpg, png, webp){lost}, {left.others:,} other files")
    table, classes = _labelled(table, source.classes, settings)
    if settings.images is not None and settings.images < len(table):
        table = table.take(hash_sample(table["path"].to_pylist(), settings.images, 0, "pack-images"))
    table = table.append_column("key", pa.array(_keys(table["path"].to_pylist())))
    if settings.shuffle is not None:
        table = _shuffled(table, settings.shuffle, by_blocks=source.by_blocks)
    ends = _cut(table["size"].to_numpy(), settings.shard_images, settings.shard_bytes)
    if settings.shuffle is not None and source.by_blocks:
        table = _shuffled_within(table, ends, settings.shuffle)
    shards = tuple(_shards(table, ends, settings.split or "shard"))
    return PackPlan(table, ends, classes, left, _digest(table, classes), shards)


def _listed(items: Iterator[PackItem]) -> pa.Table:
    batches = []
    while some := list(islice(items, _BATCH)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), _ROWS, strict=True)]
        batches.append(pa.record_batch(columns, schema=_ROWS))
    return pa.Table.from_batches(batches, _ROWS)


def _distinct(table: pa.Table, left: LeftOutItems) -> pa.Table:
    """Without rows whose path occurred before; an archive may hold one twice."""
    if pc.count_distinct(table["path"]).as_py() == len(table):
        return table
    seen, kept = set[str](), []
    for row, path in enumerate(table["path"].to_pylist()):
        if path in seen:
            left.reject(path, Reason.DUPLICATE_MEMBER, "this name already occurred")
        else:
            seen.add(path)
            kept.append(row)
    return table.take(kept)


def _labelled(
    table: pa.Table, classes: tuple[str, ...] | None, settings: PackSettings
) -> tuple[pa.Table, tuple[str, ...]]:
    """The rows of the chosen classes with their labels, and the names by label."""
    names = sorted(set(pc.unique(table["class_name"]).to_pylist()) - {""}) if classes is None else list(classes)
    chosen = names
    if settings.classes is not None:
        chosen = read_classes(settings.classes, names)
    elif settings.first_classes is not None:
        chosen = names[: settings.first_classes]
        if len(chosen) < settings.first_classes:
            raise SettingsError(f"--first-classes {settings.first_classes}: the input has only {len(names)} classes")
    labels = pc.index_in(table["class_name"], pa.array(chosen, pa.string()))
    if settings.classes is not None or settings.first_classes is not None:
        table = table.filter(labels.is_valid())
        labels = labels.drop_null()
        if not len(table):
            raise InputError(f"{settings.input}: no image of the chosen classes")
    return table.append_column("label", pc.fill_null(labels, -1).cast(pa.int32())), tuple(chosen)


def _keys(paths: Sequence[str]) -> list[str]:
    """The key of each path: the path without its extension, as for a loose image.

    Where a shard cannot hold that (a dot before the extension, a name without a beginning), or another image has it, a
    digest of the path is appended.
    """
    stems = [_stem(path) for path in paths]
    times: dict[str, int] = {}
    for stem in stems:
        times[stem] = times.get(stem, 0) + 1
    return [
        stem if times[stem] == 1 and _is_key(stem) else _made_key(stem, path)
        for stem, path in zip(stems, paths, strict=True)
    ]


def _stem(path: str) -> str:
    folder, slash, base = path.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] if "." in base else base)


def _is_key(stem: str) -> bool:
    base = stem.rpartition("/")[2]
    return bool(base) and "." not in base and not stem.startswith("__")


def _made_key(stem: str, path: str) -> str:
    folder, slash, base = stem.rpartition("/")
    return f"{folder}{slash}{base.replace('.', '_').lstrip('_') or 'image'}~{sha256(path.encode())[:12]}"


def _shuffled(table: pa.Table, seed: int, *, by_blocks: bool) -> pa.Table:
    rng, count = numpy_rng(seed, "pack-order"), len(table)
    if not by_blocks:
        return table.take(rng.permutation(count)).combine_chunks()
    blocks = np.asarray(table["at"].to_numpy() // _BLOCK)
    files = table["file"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.r_[True, (np.diff(blocks) != 0) | (np.diff(files) != 0)])
    ends = np.r_[starts[1:], count]
    order = [np.arange(starts[block], ends[block]) for block in rng.permutation(len(starts))]
    return table.take(np.concatenate(order)).combine_chunks()


def _shuffled_within(table: pa.Table, ends: Sequence[int], seed: int) -> pa.Table:
    starts = (0, *ends[:-1])
    parts = [
        start + numpy_rng(seed, "pack-order", number).permutation(end - start)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return table.take(np.concatenate(parts)).combine_chunks()


def _cut(sizes: NDArray[np.int64], most_images: int, most_bytes: int) -> tuple[int, ...]:
    """Ends of the shards: each as full as both limits allow, and with one image at least."""
    ends, start, total = list[int](), 0, 0
    for row, size in enumerate(sizes.tolist()):
        total += size + _SAMPLE_BYTES
        if row > start and (row - start >= most_images or total > most_bytes):
            ends.append(row)
            start, total = row, size + _SAMPLE_BYTES
    return (*ends, len(sizes))


def _shards(table: pa.Table, ends: Sequence[int], stem: str) -> Iterator[Shard]:
    sizes = np.concatenate([[0], np.cumsum(table["size"].to_numpy())])
    start = 0
    for number, end in enumerate(ends):
        yield Shard(f"{stem}-{number:06d}.tar", int(sizes[end] - sizes[start]), str(number))
        start = end


def _digest(table: pa.Table, classes: Sequence[str]) -> str:
    digest = hashlib.sha256(canonical(list(classes)))
    for batch in table.to_batches(max_chunksize=_BATCH):
        columns: list[Any] = [column.to_pylist() for column in batch.columns]
        digest.update(canonical(columns))
    return digest.hexdigest()
