"""What lies in a store: its objects by prefix, by pattern, in order, and one by one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from fsspec.utils import glob_translate

from pipeline.errors import InputError, StoreError
from pipeline.storage import buckets, folder
from pipeline.storage.failures import line_of
from pipeline.storage.location import Location

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")  # in any case of letters
_T = TypeVar("_T")
_new = tuple.__new__  # half the time of Entry(…), where every file of a folder is named


class Entry(NamedTuple):
    """One object: its name below the store's root, size in bytes, and the store's word for its version.

    modified  seconds since the epoch by the store's clock; 0 where it was not asked for
    """

    name: str
    size: int
    etag: str  # "" for what is no plain file: a link or a device in a folder
    modified: float = 0.0


class Listings(Location):
    """The objects of a store; nothing is written."""

    def glob(self, pattern: str) -> Iterator[Entry]:
        """What a pattern (`*`, `?`, `[…]`, `**`) matches, with an etag of "" for what is no plain file."""
        if self.is_s3:
            matches = re.compile(self.attempt("list", pattern, lambda: glob_translate(pattern))).match
            yield from (entry for entry in self.starting(re.split(r"[*?[]", pattern)[0]) if matches(entry.name))
            return
        below = re.sub(r"([*?[])", r"[\1]", self.path("").rstrip("/"))  # signs in the root's own name are none
        found = self.attempt("list", pattern, lambda: self.filesystem.glob(f"{below}/{pattern}", detail=True))
        base = len(self.path("").rstrip("/")) + 1
        for path, info in found.items():
            name = path[base:]
            if info.get("type") != "directory":
                yield (self.info(name) if self.is_local else self._entry(name, info)) or Entry(name, 0, "")
            elif name.lower().endswith(SHARD_SUFFIXES):
                yield Entry(name, 0, "")

    def starting(self, beginning: str = "") -> Iterator[Entry]:
        """Every object whose name begins so, in no order, as they are found: never all of them in memory."""
        if self.is_s3:
            yield from starmap(Entry, self._pages(beginning))
        else:
            folder_name, _, _ = beginning.rpartition("/")
            yield from (entry for entry in self._below(folder_name) if entry.name.startswith(beginning))

    def list(self, under: str = "") -> list[Entry]:
        """Every object below `under`, sorted by name; [] where nothing is there."""
        return sorted(self.starting(f"{under}/" if under else ""), key=itemgetter(0))

    def names(self, under: str = "") -> Iterator[str]:
        """Every name below `under`, in no order, as they are found: never all objects in memory, no look at each."""
        if self.is_local:
            yield from self._checked(folder.names_below(self.root, under))
        else:
            yield from (entry.name for entry in self.starting(f"{under}/" if under else ""))

    def walk(self) -> Iterator[Entry]:
        """Every object with its time, in the order of names, page by page: never all of them in memory.

        Raises InputError if there is no such folder or bucket, StoreError if a part cannot be listed.
        """
        if self.is_local:
            yield from starmap(file_entry, self._checked(folder.walk_folder(self.root)))
        else:
            yield from starmap(Entry, self._pages("")) if self.is_s3 else self.list()

    def info(self, name: str) -> Entry | None:
        """The object called `name`, or None; a folder is none."""
        try:
            if self.is_local:
                return self.attempt("look up", name, lambda: file_entry(*folder.lookup(self.path(name), name)))
            if self.is_s3:
                return Entry(
                    name, *self.attempt("look up", name, lambda: buckets.head(self.filesystem, self.path(name)))
                )
            info = self.attempt("look up", name, lambda: self.filesystem.info(self.path(name)))
            return self._entry(name, info) if info.get("type") != "directory" else None
        except InputError:
            return None

    def clock(self) -> float:
        """Seconds since the epoch by the clock that `modified` is told by: the server's, or this machine's."""
        if not self.is_s3:
            return time.time()
        return self.attempt("list", "", lambda: buckets.clock(self.filesystem, self.root))

    def _below(self, under: str) -> Iterator[Entry]:
        if self.is_local:
            yield from starmap(file_entry, self._checked(folder.files_below(self.root, under)))
            return
        found = self.attempt("list", under, lambda: self.filesystem.find(self.path(under), detail=True))
        base = len(self.path("").rstrip("/")) + 1
        yield from (self._entry(path[base:], info) for path, info in found.items() if len(path) > base)

    def _pages(self, beginning: str) -> Iterator[tuple[str, int, str, float]]:
        token: str | None = ""
        start = f"{self.root.rstrip('/')}/{beginning}"
        while token is not None:
            page = partial(buckets.page, self.filesystem, start, token)
            objects, token = self.attempt("list", beginning.rstrip("/"), page)
            yield from buckets.entries(objects, self.root)

    def _checked(self, found: Iterator[_T]) -> Iterator[_T]:
        try:
            yield from found
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"cannot list {self.url}: it is not there") from None
        except OSError as error:
            raise StoreError(f"cannot list {self.url}: {line_of(error)}") from None

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        size = int(info.get("size") or 0)
        etag = info.get("ETag") or info.get("etag") or f"{size}-{info.get('mtime') or info.get('created') or ''}"
        return Entry(name, size, str(etag).strip('"'))


def file_entry(name: str, size: int, modified: float, changed: int, is_file: bool) -> Entry:
    """The entry of a local file, as `folder` describes it."""
    return _new(Entry, (name, size, f"{size}-{int(modified * 1e6)}-{changed}" if is_file else "", modified))
