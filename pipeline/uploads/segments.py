"""Rows of the ledger <-> Parquet, sorted by name, in blocks: memory use does not grow with the number of rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import unreadable
from pipeline.uploads.listing import Known

BLOCK_ROWS = 8192

_SCHEMA = pa.schema(
    [
        ("name", pa.binary()),  # UTF-8, or arbitrary bytes from a file system
        ("etag", pa.string()),
        ("version", pa.int32()),
        ("size", pa.int64()),
        ("kind", pa.string()),
        ("output", pa.binary()),
        ("output_size", pa.int64()),
        ("output_sha256", pa.string()),
        ("cluster", pa.int32()),
        ("distance", pa.float32()),
        ("protected", pa.int64()),
        ("quarantined", pa.int64()),
        ("drifted", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_BYTES = ("name", "output")
_NAME, _VERSION = _SCHEMA.get_field_index("name"), _SCHEMA.get_field_index("version")


@dataclass(frozen=True)
class Row:
    """What was done with one version of one object; quarantined as a whole if `output` is empty.

    version      1 for the first version, incremented with every change of the object
    output       name in the output; "" if there is none
    cluster      nearest centroid; -1 for a shard or without an output
    distance     to that centroid; None for a shard or without an output
    protected    number of images in it that were protected
    quarantined  number of images in it that were quarantined
    drifted      number of protected images beyond p99 of the fitted images' distances
    reason       why it is quarantined, or ""
    """

    name: str
    etag: str
    version: int
    size: int
    kind: str
    output: str = ""
    output_size: int = 0
    output_sha256: str = ""
    cluster: int = -1
    distance: float | None = None
    protected: int = 0
    quarantined: int = 0
    drifted: int = 0
    reason: str = ""
    detail: str = ""

    def agrees_with(self, other: Row) -> bool:
        """True if both record the same bytes made from the same version."""
        return self._said == other._said

    @property
    def _said(self) -> tuple[object, ...]:
        return self.name, self.etag, self.version, self.output, self.output_sha256, self.reason


_FIELDS = tuple(f.name for f in fields(Row))
assert tuple(_SCHEMA.names) == _FIELDS
Values = tuple[Any, ...]  # of a Row, in field order


@dataclass(frozen=True)
class Segment:
    """A sorted file of the ledger, with sums over its rows."""

    name: str
    rows: int
    protected: int
    quarantined: int
    drifted: int


def values_of(row: Row) -> Values:
    """The row as a tuple, in the order of its fields."""
    return tuple(getattr(row, name) for name in _FIELDS)


def write_segment(rows: Iterable[Values], path: Path, name: str) -> Segment:
    """Write rows, sorted and unique by name, block by block to a local file; returns its name and sums."""
    sums = [0, 0, 0, 0]
    places = [_FIELDS.index(field) for field in ("protected", "quarantined", "drifted")]
    left = iter(rows)
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        while block := list(islice(left, BLOCK_ROWS)):
            writer.write_table(_table(block))
            sums = _added(sums, block, places)
    return Segment(name, *sums)


def _added(sums: list[int], block: list[Values], places: list[int]) -> list[int]:
    counts = [len(block), *(sum(row[place] for row in block) for place in places)]
    return [old + more for old, more in zip(sums, counts, strict=True)]


def _table(block: list[Values]) -> pa.Table:
    columns = dict(zip(_FIELDS, map(list, zip(*block, strict=True)), strict=True))
    for name in _BYTES:
        columns[name] = [text.encode("utf-8", "surrogateescape") for text in columns[name]]
    return pa.table(columns, schema=_SCHEMA)


def read_values(file: IO[bytes], where: str) -> Iterator[Values]:
    """The rows of a segment, in order. Raises InputError, naming `where`, if it is damaged."""
    yield from _read(file, where, _FIELDS)


def read_known(file: IO[bytes], where: str) -> Iterator[Known]:
    """(name, etag, version) of a segment's rows, in order, without reading other columns. Raises InputError."""
    yield from _read(file, where, ("name", "etag", "version"))


def _read(file: IO[bytes], where: str, names: tuple[str, ...]) -> Iterator[Any]:
    try:
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            if not opened.schema_arrow.equals(_SCHEMA):
                raise ValueError("unexpected columns")
            for batch in opened.iter_batches(BLOCK_ROWS, columns=list(names), use_threads=False):
                columns = [_texts(batch.column(n)) if n in _BYTES else batch.column(n).to_pylist() for n in names]
                yield from zip(*columns, strict=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(where, error, "restore it; without ledger.json, everything would be protected again") from None


def _texts(column: Any) -> list[str]:
    try:
        return list(column.cast(pa.string()).to_pylist())
    except pa.ArrowInvalid:  # a name that is not UTF-8
        return [data.decode("utf-8", "surrogateescape") for data in column.to_pylist()]


def merged(parts: list[Iterator[Values]]) -> Iterator[Values]:
    """Merge sorted parts, keeping only the latest version of each name."""
    return parts[0] if len(parts) == 1 else _latest(parts, _VERSION)


def merged_known(parts: list[Iterator[Known]]) -> Iterator[Known]:
    """Like `merged`, for (name, etag, version)."""
    return parts[0] if len(parts) == 1 else _latest(parts, 2)


def _latest(parts: list[Iterator[Any]], version: int) -> Iterator[Any]:
    ordered = heapq.merge(*parts, key=itemgetter(_NAME))
    for _, same in groupby(ordered, key=itemgetter(_NAME)):
        yield max(same, key=lambda row: (row[version], row[1]))
