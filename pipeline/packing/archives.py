"""Tar archives of images, plain, as ImageNet is published: a tar of class tars, or a tar of validation images.

Only headers are read to list an archive, and images are read where they lie: nothing is extracted to disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO

from pipeline.errors import InputError, Reason
from pipeline.packing.items import Content, LeftOutItems, PackItem, by_file, class_folder, in_order, rejected
from pipeline.records import Rejection
from pipeline.shards.archive import END, FILE, FOLDER, LABEL, ArchivePart, Damaged, Gap, Member, members_of
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store

_NUMBER = re.compile(r"_(\d{8})\.[^./]+$")  # of a validation image


@dataclass(frozen=True)
class TarSource:
    """Images in archives.

    files     archives in the store, sorted
    by_name   True if each archive is a class, called like it
    truth     classes of the validation images by their number, from 1 on; None: the class is the first folder
    """

    store: Store
    files: tuple[Entry, ...]
    by_name: bool = False
    truth: tuple[str, ...] | None = None
    classes = None
    by_blocks = False

    def items(self, left: LeftOutItems) -> Iterator[PackItem]:
        for entry in self.files:
            prefix = f"{_stem(entry.name)}/" if self.by_name else ""
            with self.store.open_version(entry.name, entry.etag) as stream:
                if stream.read(2) == b"\x1f\x8b":
                    raise InputError(f"{self.store.url}/{entry.name} is gzipped: run gunzip first, so that it can seek")
                yield from _Scan(self, entry, stream, left).images(0, entry.size, prefix)

    def contents(self, items: Sequence[PackItem]) -> Iterator[Content | Rejection]:
        return in_order(self._found(items))

    def _found(self, items: Sequence[PackItem]) -> Iterator[tuple[int, Content | Rejection]]:
        for file, etag, numbers in by_file(items):
            with self.store.open_version(file, etag) as stream:
                for number in numbers:
                    item = items[number]
                    stream.seek(item.at)
                    data = stream.read(item.size)
                    if len(data) < item.size:
                        yield number, rejected(item, Reason.TRUNCATED_SHARD, f"{file} ends within it")
                    else:
                        yield number, Content(item.path.rpartition(".")[2].lower(), data, _NOTHING)

    @cached_property
    def num_truths(self) -> int:
        return len(self.truth or ())

    def class_of(self, path: str) -> str:
        """The class of an image. Raises InputError if the ground truth does not tell."""
        if self.truth is None:
            return class_folder(path)
        number = _NUMBER.search(path)
        if number is None or not 1 <= int(number[1]) <= self.num_truths:
            raise InputError(
                f"--ground-truth has {self.num_truths:,} lines, of which none is that of {path}: expected names "
                "such as ILSVRC2012_val_00000001.JPEG"
            )
        return self.truth[int(number[1]) - 1]


@dataclass(frozen=True)
class _Scan:
    """The headers of one archive, being read."""

    source: TarSource
    entry: Entry
    stream: IO[bytes]
    left: LeftOutItems

    def images(self, start: int, size: int, prefix: str, *, nested: bool = False) -> Iterator[PackItem]:
        part = ArchivePart(self.stream, start, size)
        where = prefix.rstrip("/") if nested else self.entry.name
        try:
            for member in members_of(part):
                if isinstance(member, Gap):
                    self.left.reject(where, Reason.TRUNCATED_SHARD, f"the archive {member.what}")
                elif member.kind not in (END, FOLDER, LABEL):
                    at = start + part.at
                    if not nested and member.kind == FILE and member.name.lower().endswith(".tar"):
                        within = min(member.size, start + size - at)
                        yield from self.images(at, within, f"{_stem(member.name)}/", nested=True)
                    else:
                        yield from self._image(member, prefix, at, start + size)
                    part.skip_body(member.size)
                elif member.kind != END:
                    part.skip_body(member.size)
        except Damaged as error:
            self.left.reject(where, Reason.TRUNCATED_SHARD, f"the archive {error}")

    def _image(self, member: Member, prefix: str, at: int, end: int) -> Iterator[PackItem]:
        path = prefix + member.name.removeprefix("./")
        if path.endswith(".cls"):
            raise InputError(
                f"{self.source.store.url}/{self.entry.name} has labels ({path}): it is a shard already, ready for "
                "protect_imagenet.py"
            )
        if not self.left.accepts(path, member.size, is_file=member.kind == FILE):
            return
        if at + member.size > end:
            self.left.reject(path, Reason.TRUNCATED_SHARD, "the archive ends within it")
            return
        yield PackItem(path, self.source.class_of(path), member.size, self.entry.name, self.entry.etag, at)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


_NOTHING: Mapping[str, str] = {}
