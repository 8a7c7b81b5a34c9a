"""What every source has in common: items that can be listed at once and read later, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pipeline.errors import Reason, SampleError
from pipeline.layout import RUN_FOLDER
from pipeline.pictures.formats import kind_of
from pipeline.records import IMAGE_SUFFIXES, Rejection, shown
from pipeline.shards.names import fault_of, is_of_the_system, unread
from pipeline.storage.listings import Entry

MAX_PATH_BYTES = 1024  # the longest key that S3 takes, so that whatever is packed can be unpacked anywhere
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_OTHER_PICTURES = re.compile(r"\.(ico|svg)$")
_ARCHIVES = re.compile(r"\.(tar|tgz|tar\.[a-z0-9]+|zip|7z|rar|npz|parquet)$")


class PackItem(NamedTuple):
    """One image of a source, before it is read.

    path        where it lies in the original collection, and where it is unpacked to; safe to write anywhere
    class_name  "" if it has no label
    size        bytes of the image, or an estimate where only reading would tell
    file        object of the store that holds it; "" if that is `path` itself
    etag        version of that object
    at          offset in bytes, or row
    """

    path: str
    class_name: str
    size: int
    file: str
    etag: str
    at: int


class Content(NamedTuple):
    """What is packed of one item.

    about  what else the source says of it, JSON values by name
    text   caption; None if there is none
    """

    suffix: str
    data: bytes
    about: Mapping[str, Any]
    text: str | None = None


class DataSource(Protocol):
    """A collection in one format. Pickles, so that any worker can read any item."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of their labels; None: whatever occurs, sorted."""

    @property
    def by_blocks(self) -> bool:
        """True if items of one file and neighbouring `at` are cheap to read only together."""

    def items(self, left: LeftOutItems) -> Iterator[PackItem]:
        """Every image, in an order that depends on the input alone; `left` is told of the rest.

        Raises InputError for an input that cannot be listed.
        """

    def contents(self, items: Sequence[PackItem]) -> Iterator[Content | Rejection]:
        """What is packed of each item, in order. Raises InputError (changed-input) for another version of a file."""


@dataclass
class LeftOutItems:
    """What a source holds beside its images.

    rejections    images, or what may hold some, that cannot be packed
    others        number of files that are no images, such as texts
    first_others  the first of their names
    """

    max_member_bytes: int
    rejections: list[Rejection] = field(default_factory=list)
    others: int = 0
    first_others: list[str] = field(default_factory=list)

    def reject(self, name: str, reason: Reason, detail: str) -> None:
        """An image, or what may hold some, that is not packed."""
        self.rejections.append(Rejection(shown(name), shown(name), reason, detail))

    def other(self, name: str) -> None:
        """A file that is no image."""
        self.others += 1
        if len(self.first_others) < 3:
            self.first_others.append(shown(name))

    def beside(self, entries: Iterable[Entry], what: str) -> None:
        """Files beside those that a source reads.

        what  those that it reads, for the messages
        """
        for entry in entries:
            if self.accepts(entry.name, entry.size, is_file=bool(entry.etag)):
                self.reject(entry.name, Reason.UNSUPPORTED_FORMAT, f"it lies beside {what}: pack it apart")

    def accepts(self, name: str, size: int, *, is_file: bool = True) -> bool:
        """True for the name of an image that can be packed; notes anything else.

        Whatever is not a regular file is rejected, because what it leads to may be images. A run's records and
        files that systems leave in any folder are passed over.
        """
        base = name.rpartition("/")[2]
        if name.startswith(f"{RUN_FOLDER}/") or is_of_the_system(name):
            return False
        if not is_file:
            self.reject(name, Reason.NOT_A_FILE, "a link, a fifo, a socket or a device; links are not followed")
            return False
        if not base:
            self.reject(name, Reason.UNUSABLE_NAME, "the name is empty, or ends in a slash")
            return False
        lower = base.lower()
        is_image = lower.rpartition(".")[2] in IMAGE_SUFFIXES and "." in lower
        if not is_image:
            fault = unread(lower)
            if _ARCHIVES.search(lower):
                self.reject(name, Reason.UNSUPPORTED_FORMAT, "pack it by itself, as --input")
            elif fault is not None or _OTHER_PICTURES.search(lower):
                self.reject(name, *(fault or (Reason.UNSUPPORTED_FORMAT, "convert it to JPEG, PNG or WebP")))
            else:
                self.other(name)
            return False
        fault = path_fault(name) or size_fault(size, self.max_member_bytes)
        if fault is not None:
            self.reject(name, *fault)
        return fault is None


def path_fault(path: str) -> tuple[Reason, str] | None:
    """Why a path cannot be written everywhere, or None."""
    if path.startswith("/") or re.match(r"[A-Za-z]:[/\\]", path):
        return Reason.UNSAFE_NAME, "the name is absolute"
    if len(path.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        return Reason.UNUSABLE_NAME, f"the name is longer than {MAX_PATH_BYTES:,} bytes"
    return fault_of(path)


def size_fault(size: int, limit: int) -> tuple[Reason, str] | None:
    """Why an image of `size` bytes is not packed, or None."""
    if size == 0:
        return Reason.EMPTY, "0 bytes"
    if size > limit:
        return Reason.TOO_LARGE, f"{size:,} bytes exceed --max-member-bytes {limit:,}"
    return None


def suffix_of(data: bytes) -> str:
    """Suffix of an image whose name does not tell. Raises SampleError unless it is a JPEG, PNG or WebP."""
    kind = kind_of(data)
    if kind not in _SUFFIXES:
        raise SampleError(Reason.UNSUPPORTED_FORMAT, f"not a JPEG, PNG or WebP, but {kind or 'no known picture'}")
    return _SUFFIXES[kind]


def class_folder(path: str) -> str:
    """The first folder of a path, which is its class; "" for a file at the top."""
    return path.partition("/")[0] if "/" in path else ""


def rejected(item: PackItem, reason: Reason, detail: str) -> Rejection:
    """The quarantine entry for an item."""
    return Rejection(item.path, item.path, reason, detail)


def by_file(items: Sequence[PackItem]) -> Iterator[tuple[str, str, list[int]]]:
    """(file, etag, numbers of its items) for every file, so that each is opened once, however items are shuffled."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault((item.file, item.etag), []).append(number)
    for (file, etag), numbers in groups.items():
        yield file, etag, numbers


def in_order(found: Iterable[tuple[int, Content | Rejection]]) -> Iterator[Content | Rejection]:
    """What was found of items 0, 1, 2, ..., each as soon as it and all before it are there."""
    early: dict[int, Content | Rejection] = {}
    waiting = 0
    for number, content in found:
        early[number] = content
        while waiting in early:
            yield early.pop(waiting)
            waiting += 1
