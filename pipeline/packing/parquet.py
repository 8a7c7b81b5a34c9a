"""Parquet with image bytes: as Hugging Face writes it (`image: {bytes, path}`, `label`), or like LAION (`jpg`).

Other columns of plain values go with the image, and back into Parquet when it is unpacked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, Reason, SampleError, one_line
from pipeline.packing.items import Content, LeftOutItems, PackItem, by_file, in_order, rejected, size_fault, suffix_of
from pipeline.packing.labels import numbered
from pipeline.records import Rejection, shown
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store

_TOGETHER = 16  # rows decoded at once: what a hostile file can make of a few bytes is bounded by their number
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_LABELS = ("label", "labels", "fine_label", "class", "cls")
_TEXTS = ("caption", "text", "txt", "TEXT")
_PATHS = ("path", "file_name")


class Columns(NamedTuple):
    """Names of the columns that matter; "" for what is missing.

    names  of the classes, by label, if the file says them
    about  the other columns of plain values
    lost   columns that cannot go with an image: lists, bytes, nested values
    """

    image: str
    is_struct: bool
    label: str
    text: str
    names: tuple[str, ...]
    about: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class ParquetSource:
    """Files of one schema, in order.

    classes  names by label; None: labels are names
    """

    store: Store
    files: tuple[Entry, ...]
    columns: Columns
    classes: tuple[str, ...] | None
    max_member_bytes: int
    by_blocks = True

    def items(self, left: LeftOutItems) -> Iterator[PackItem]:
        for entry in self.files:
            with self.store.open_version(entry.name, entry.etag) as stream:
                file = opened(stream, f"{self.store.url}/{entry.name}")
                yield from self._rows(entry, file)

    def _rows(self, entry: Entry, file: pq.ParquetFile) -> Iterator[PackItem]:
        stem, row = entry.name.removesuffix(".parquet"), 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            size = file.metadata.row_group(group).total_byte_size // max(rows, 1)
            for label in self._labels(file, group, f"{self.store.url}/{entry.name}"):
                yield PackItem(f"{stem}/{row:08d}", label, size, entry.name, entry.etag, row)
                row += 1

    def _labels(self, file: pq.ParquetFile, group: int, where: str) -> Iterator[str]:
        """Class names of a row group; "" for a row without a label."""
        if not self.columns.label:
            yield from [""] * file.metadata.row_group(group).num_rows
            return
        values = _readable(where, lambda: file.read_row_group(group, columns=[self.columns.label])).column(0)
        if len(values) != file.metadata.row_group(group).num_rows:
            raise InputError(f"{where}: not Parquet, or damaged (row group {group} has {len(values):,} labels)")
        for value in values.to_pylist():
            if value is not None and self.classes is not None and not 0 <= value < len(self.classes):
                if value == -1:  # how test sets without labels are published
                    value = None
                else:
                    raise InputError(f"{where}: label {value} is none of {len(self.classes)} classes")
            yield "" if value is None else self.classes[value] if self.classes is not None else shown(str(value))

    def contents(self, items: Sequence[PackItem]) -> Iterator[Content | Rejection]:
        """Each row group is read once, and of each file."""
        return in_order(self._found(items))

    def _found(self, items: Sequence[PackItem]) -> Iterator[tuple[int, Content | Rejection]]:
        for name, etag, numbers in by_file(items):
            with self.store.open_version(name, etag) as stream:
                file = opened(stream, f"{self.store.url}/{name}")
                yield from self._of_file(file, {items[number].at: number for number in numbers}, items)

    def _of_file(
        self, file: pq.ParquetFile, wanted: dict[int, int], items: Sequence[PackItem]
    ) -> Iterator[tuple[int, Content | Rejection]]:
        start = 0
        for group in range(file.num_row_groups):
            rows = range(start, start + file.metadata.row_group(group).num_rows)
            start = rows.stop
            if wanted.keys().isdisjoint(rows):
                continue
            for row, content in self._of_group(file, group, rows, wanted, items):
                yield wanted[row], content

    def _of_group(
        self, file: pq.ParquetFile, group: int, rows: range, wanted: dict[int, int], items: Sequence[PackItem]
    ) -> Iterator[tuple[int, Content | Rejection]]:
        columns = [self.columns.image, *self.columns.about, *filter(None, (self.columns.text,))]
        row, why = rows.start, "its row group has fewer rows than the file says"
        try:
            for batch in file.iter_batches(_TOGETHER, row_groups=[group], columns=columns):
                for values in _chosen(batch, row, wanted):
                    yield values[0], self._content(items[wanted[values[0]]], values[1])
                row += len(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # damaged; failures of the store are neither
            why = f"its row group cannot be read ({one_line(error, 80)})"
        for lost in (one for one in range(row, rows.stop) if one in wanted):
            yield lost, rejected(items[wanted[lost]], Reason.TRUNCATED_SHARD, why)

    def _content(self, item: PackItem, values: dict[str, Any]) -> Content | Rejection:
        image = values[self.columns.image]
        about = {name: values[name] for name in self.columns.about if _is_value(values[name])}
        if self.columns.is_struct:
            path = (image or {}).get("path")
            about |= {"image_path": path} if isinstance(path, str) and path else {}
            image = (image or {}).get("bytes")
        if image is None:
            return rejected(item, Reason.NO_IMAGE, "the row has no image bytes")
        fault = size_fault(len(image), self.max_member_bytes)
        if fault is not None:
            return rejected(item, *fault)
        try:
            suffix = suffix_of(image)
        except SampleError as error:
            return rejected(item, error.reason, error.detail)
        text = values[self.columns.text] if self.columns.text else None
        return Content(suffix, image, about, text)


def _is_value(value: Any) -> bool:
    """True for what JSON can say."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _chosen(batch: pa.RecordBatch, start: int, wanted: dict[int, int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(batch)):
        if start + index in wanted:
            yield start + index, {name: batch.column(name)[index].as_py() for name in batch.schema.names}


def parquet_source(store: Store, files: Sequence[Entry], max_member_bytes: int) -> ParquetSource:
    """The source for files of one schema. Raises InputError, naming the file, if one has no image bytes or differs."""
    columns, values = None, set[int]()
    is_number = True
    for entry in files:
        where = f"{store.url}/{entry.name}"
        with store.open_version(entry.name, entry.etag) as stream:
            file = opened(stream, where)
            seen = columns_of(file.schema_arrow, where)
            if columns is not None and seen != columns:
                raise InputError(f"{where} has other columns than {files[0].name}: pack them apart")
            columns = seen
            if seen.label:
                is_number = pa.types.is_integer(file.schema_arrow.field(seen.label).type)
            if is_number and seen.label and not seen.names:
                values |= _numbers_in(file, seen.label, where)
    if columns is None:
        raise InputError(f"{store.url}: no *.parquet there")
    classes = columns.names or numbered(iter(values - {-1}), store.url) if is_number else None
    return ParquetSource(store, tuple(files), columns, classes, max_member_bytes)


def _numbers_in(file: pq.ParquetFile, label: str, where: str) -> set[int]:
    values = set[int]()
    for group in range(file.num_row_groups):
        table = _readable(where, lambda group=group: file.read_row_group(group, columns=[label]))
        values |= {value for value in table.column(0).unique().to_pylist() if value is not None}
    return values


def opened(stream: IO[bytes], where: str) -> pq.ParquetFile:
    """The file behind a stream. Raises InputError if it is none, or lacks its end."""
    file: pq.ParquetFile = _readable(where, lambda: pq.ParquetFile(stream))
    return file


def _readable(where: str, action: Any) -> Any:
    try:
        return action()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: not Parquet, or damaged ({one_line(error, 120)})") from None


def columns_of(schema: pa.Schema, where: str) -> Columns:
    """Which columns are what. Raises InputError if none holds the bytes of images."""
    image = next((name for name in _IMAGES if name in schema.names and _is_image(schema.field(name).type)), "")
    if not image:
        structs = [field.name for field in schema if _is_struct(field.type)]
        if len(structs) != 1:
            hint = "; it has URLs: download the images first, e.g. with img2dataset" if _has_urls(schema) else ""
            held = ", ".join(f"{field.name}: {one_line(field.type, 40)}" for field in list(schema)[:8])
            raise InputError(f"{where}: no column with the bytes of images among {held}{hint}")
        image = structs[0]
    label = next((name for name in _LABELS if name in schema.names and _is_label(schema.field(name).type)), "")
    text = next((name for name in _TEXTS if name in schema.names and _is_text(schema.field(name).type)), "")
    rest = [field for field in schema if field.name not in (image, label, text)]
    about = tuple(field.name for field in rest if _is_plain(field.type) and field.name not in _OURS)
    lost = tuple(field.name for field in rest if field.name not in about)
    return Columns(image, _is_struct(schema.field(image).type), label, text, _names(schema, label), about, lost)


_OURS = ("path", "class", "image_path")  # names that a sample's JSON has already


def _has_urls(schema: pa.Schema) -> bool:
    return any(name.lower() in ("url", "urls", "image_url") for name in schema.names)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _is_image(kind: pa.DataType) -> bool:
    return _is_binary(kind) or _is_struct(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or _is_text(kind))


def _is_plain(kind: pa.DataType) -> bool:
    return bool(_is_label(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Class names from what Hugging Face notes in the schema; () if it notes none."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    readable = tuple(map(shown, names))
    return readable if len(set(readable)) == len(names) else ()
