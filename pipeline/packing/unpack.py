"""Shards -> the folder tree that they were packed from, or Parquet; one commit per shard, like packing.

A sample goes to the `path` in its JSON, or to its key where it has none. Nothing that exists is overwritten, and no
name leaves the output.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.errors import InputError, Reason, SampleError
from pipeline.hashing import canonical, sha256, sha256_of
from pipeline.layout import RUN_FOLDER
from pipeline.packing.items import class_folder, path_fault
from pipeline.packing.pack import PackCommit, counted
from pipeline.packing.settings import UnpackFormat
from pipeline.pictures.members import image_suffix, rejection_of
from pipeline.records import Rejection, Sample, Shard, quarantine_to_bytes, shown
from pipeline.shards.scratch import scratch_for
from pipeline.shards.tar import read_samples
from pipeline.storage.store import Store

LABELS = "labels.csv"
_ROWS = 100  # per row group, as Hugging Face writes images
_GROUP_BYTES = 256 << 20
_COLUMNS = ("image", "label", "class", "text")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PLAIN = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


@dataclass(frozen=True)
class Unpacked:
    """One sample, as it is written.

    path   where its image goes
    label  None without a .cls
    about  what its JSON says, but for path and class
    """

    path: str
    suffix: str
    data: bytes
    label: int | None
    class_name: str
    texts: dict[str, bytes]
    about: dict[str, Any]


@dataclass
class _Written:
    """What was written of a shard: name, size and digest of each file, and (path, class) of each image with a label."""

    files: list[tuple[str, int, str]] = field(default_factory=list)
    labels: list[tuple[str, str]] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    num_images: int = 0
    image_bytes: int = 0

    def count(self, one: Unpacked) -> None:
        """An image is written."""
        self.num_images += 1
        self.image_bytes += len(one.data)
        if one.label is not None:
            self.labels.append((one.path, one.class_name or str(one.label)))


@dataclass(frozen=True)
class Unpacking:
    """What every worker needs to unpack any shard of a run."""

    source: Store
    output: Store
    format: UnpackFormat
    fingerprint: str
    max_member_bytes: int

    def committed(self, shard: Shard) -> PackCommit | None:
        """The commit of a shard, or None if it is not done."""
        return PackCommit.read(self.output, layout.pack_commit(shard.name))

    def run(self, shard: Shard) -> PackCommit:
        """Write what a shard holds, then its quarantine, then its commit.

        Raises InputError (changed-input) if the shard is not the version that was listed, ConflictError if another run
        has committed different bytes, StoreError if there is no room.
        """
        if (existing := self.committed(shard)) is not None:
            return existing
        started = time.perf_counter()
        written = _Written()
        (self._to_folder if self.format == "folder" else self._to_parquet)(shard, written)
        if written.labels and self.format == "folder":
            self.output.put(layout.pack_labels(shard.name), _csv(written.labels))
        if written.rejections:
            self.output.put(layout.pack_quarantine(shard.name), quarantine_to_bytes(written.rejections))
        commit = PackCommit(
            fingerprint=self.fingerprint,
            shard=shard.name,
            output_size=sum(size for _, size, _ in written.files),
            output_sha256=sha256(canonical(written.files)),
            num_images=written.num_images,
            num_quarantined=len(written.rejections),
            image_bytes=written.image_bytes,
            quarantine=counted(written.rejections),
            seconds=time.perf_counter() - started,
        )
        return commit.created(self.output)

    def _samples(self, shard: Shard, rejections: list[Rejection]) -> Iterator[Unpacked]:
        with self.source.open_version(shard.name, shard.etag) as stream:
            for sample in read_samples(stream, max_member_bytes=self.max_member_bytes):
                one = sample if isinstance(sample, Rejection) else unpacked(sample)
                if isinstance(one, Rejection):
                    rejections.append(one)
                else:
                    yield one

    def _to_folder(self, shard: Shard, written: _Written) -> None:
        """One file per image, and one per text beside it."""
        for one in self._samples(shard, written.rejections):
            refused = self._put(one.path, one.data, written)
            if refused is not None:
                written.rejections.append(refused)
                continue
            written.count(one)
            stem = one.path.rpartition(".")[0]
            texts = (self._put(f"{stem}.{suffix}", data, written) for suffix, data in one.texts.items())
            written.rejections += filter(None, texts)

    def _put(self, path: str, data: bytes, written: _Written) -> Rejection | None:
        """Create a file; a file with other contents is left alone, and why this one is not written is returned."""
        if path.lower() == LABELS:
            return Rejection(path, path, Reason.UNUSABLE_NAME, "the name is that of the list of labels")
        long = self.output.too_long(path)
        if long:
            return Rejection(path, path, Reason.UNUSABLE_NAME, f"in the output: {long}")
        try:
            if not self.output.create(path, data) and self.output.read(path) != data:
                why = "the output has another file of this name, perhaps in another case"
                return Rejection(path, path, Reason.DUPLICATE_MEMBER, why)
        except InputError:
            if not self.output.is_local:
                raise
            why = "a file in the output blocks this name's folder, or a folder this name"
            return Rejection(path, path, Reason.UNUSABLE_NAME, why)
        written.files.append((path, len(data), sha256(data)))
        return None

    def _to_parquet(self, shard: Shard, written: _Written) -> None:
        """One file per shard, read twice: the first time for the columns, so that few images are held at once."""
        kinds: dict[str, set[pa.DataType]] = {}
        for one in self._samples(shard, []):
            for name, value in one.about.items():
                kinds.setdefault(name, set()).update(() if value is None else (_kind(value),))
        schema = _schema(kinds)
        name = parquet_name(shard)
        with scratch_for(shard) as scratch:
            path = scratch / "parquet"
            with pq.ParquetWriter(path, schema) as writer:
                samples = self._samples(shard, written.rejections)
                for some in _groups(samples):
                    for one in some:
                        written.count(one)
                    writer.write_table(pa.Table.from_pylist([_row(one, schema) for one in some], schema))
            written.files.append((name, path.stat().st_size, sha256_of(path)))
            self.output.put_file(name, path)


def parquet_name(shard: Shard) -> str:
    """The name of the file that a shard becomes."""
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", shard.name, flags=re.IGNORECASE) + ".parquet"


def _groups(samples: Iterable[Unpacked]) -> Iterator[list[Unpacked]]:
    """Row groups, of at most _ROWS images and about _GROUP_BYTES."""
    some, size = list[Unpacked](), 0
    for one in samples:
        some.append(one)
        size += len(one.data)
        if len(some) == _ROWS or size > _GROUP_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _kind(value: Any) -> pa.DataType:
    """The column that a value of a sample's JSON fits into; text, as JSON, for what is nested or too large."""
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return pa.string()
    return _PLAIN.get(type(value), pa.string())


def _schema(kinds: dict[str, set[pa.DataType]]) -> pa.Schema:
    """Columns for what the JSON of all samples says; where it says values of several kinds, text."""
    fields = [("image", _IMAGE), ("label", pa.int64()), ("class", pa.string()), ("text", pa.string())]
    fields += [
        (name, next(iter(found)) if len(found) == 1 else pa.string())
        for name, found in sorted(kinds.items())
        if name not in _COLUMNS
    ]
    return pa.schema(fields)


def _row(one: Unpacked, schema: pa.Schema) -> dict[str, Any]:
    text = one.texts.get("txt")
    row: dict[str, Any] = {
        "image": {"bytes": one.data, "path": one.path},
        "label": one.label,
        "class": one.class_name or None,
        "text": None if text is None else text.decode("utf-8", "replace"),
    }
    for name, value in one.about.items():
        if name not in _COLUMNS:
            is_text = schema.field(name).type == pa.string() and not isinstance(value, str | None)
            row[name] = canonical(value).decode() if is_text else value
    return row


def unpacked(sample: Sample) -> Unpacked | Rejection:
    """Where a sample's image goes, and what is said of it; a Rejection for one without an image or with a bad name."""
    try:
        suffix = image_suffix(sample)
    except SampleError as error:
        return rejection_of(sample, error)
    about = _about(sample)
    path = about.pop("path", None)
    path = _fitting(path, suffix) if isinstance(path, str) and path else f"{sample.key}.{suffix}"
    fault = path_fault(path)
    if fault is None and path.startswith(f"{RUN_FOLDER}/"):
        fault = Reason.UNSAFE_NAME, "the name is that of a run's record"
    if fault is not None:
        return Rejection(sample.key, shown(path), *fault)
    class_name = about.pop("class", "")
    label = sample.members.get("cls", b"")
    is_ours = "path" in _about(sample) and not about  # what packing alone has written
    texts = {
        name: data
        for name, data in sample.members.items()
        if name not in (suffix, "cls") and not (name == "json" and is_ours)
    }
    return Unpacked(
        path,
        suffix,
        sample.members[suffix],
        int(label) if re.fullmatch(rb"\s*[0-9]{1,9}\s*", label) else None,
        class_name if isinstance(class_name, str) else "",
        texts,
        about,
    )


def _about(sample: Sample) -> dict[str, Any]:
    try:
        value = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    about = value if isinstance(value, dict) else {}
    return {_encodable(name): _encodable(one) if isinstance(one, str) else one for name, one in about.items()}


def _encodable(text: str) -> str:
    """JSON may hold halves of characters, which no file can."""
    return text.encode("utf-8", "backslashreplace").decode()


def _fitting(path: str, suffix: str) -> str:
    """The path, with another extension appended if the image has another format now."""
    kinds = [one.lower().replace("jpeg", "jpg") for one in (path.rpartition(".")[2], suffix.rpartition(".")[2])]
    return path if kinds[0] == kinds[1] else f"{path}.{kinds[1]}"


def _csv(rows: Iterable[tuple[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def write_labels(output: Store, shards: Iterable[Shard]) -> bool:
    """Write labels.csv (path,label) if the folders do not tell the classes; True if so."""
    parts, is_told = list[bytes](), True
    for shard in shards:
        part = output.read_if_there(layout.pack_labels(shard.name))
        if part is not None:
            parts.append(part)
            rows = csv.reader(io.StringIO(part.decode(), newline=""))
            is_told = is_told and all(class_folder(path) == label for path, label in rows)
    if not is_told:
        output.put(LABELS, b"".join([b"path,label\n", *parts]))
    return not is_told
