"""List a store's objects: by prefix, by pattern, sorted, or one at a time."""

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

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")  # in any case
_T = TypeVar("_T")
_new = tuple.__new__  # twice as fast as Entry(…), which matters when listing every file of a folder


class Entry(NamedTuple):
    """One object: its name below the store's root, size in bytes, and version.

    modified  seconds since the epoch by the store's clock; 0 if not requested
    """

    name: str
    size: int
    etag: str  # "" for anything but a regular file, such as a link or device in a folder
    modified: float = 0.0


class Listings(Location):
    """The objects of a store; read-only."""

    def glob(self, pattern: str) -> Iterator[Entry]:
        """Entries matching a pattern (`*`, `?`, `[…]`, `**`); the etag is "" for anything but a regular file."""
        if self.is_s3:
            matches = re.compile(self.attempt("list", pattern, lambda: glob_translate(pattern))).match
            yield from (entry for entry in self.starting(re.split(r"[*?[]", pattern)[0]) if matches(entry.name))
            return
        below = re.sub(r"([*?[])", r"[\1]", self.path("").rstrip("/"))  # wildcards in the root's own name are literal
        matches_by_path = self.attempt("list", pattern, lambda: self.filesystem.glob(f"{below}/{pattern}", detail=True))
        base = len(self.path("").rstrip("/")) + 1
        for path, info in matches_by_path.items():
            name = path[base:]
            if info.get("type") != "directory":
                yield (self.info(name) if self.is_local else self._entry(name, info)) or Entry(name, 0, "")
            elif name.lower().endswith(SHARD_SUFFIXES):
                yield Entry(name, 0, "")

    def starting(self, beginning: str = "") -> Iterator[Entry]:
        """Stream the objects whose names begin with `beginning`, unsorted, without holding all of them in memory."""
        if self.is_s3:
            yield from starmap(Entry, self._pages(beginning))
        else:
            folder_name, _, _ = beginning.rpartition("/")
            yield from (entry for entry in self._below(folder_name) if entry.name.startswith(beginning))

    def list(self, under: str = "") -> list[Entry]:
        """Every object below `under`, sorted by name; [] if there are none."""
        return sorted(self.starting(f"{under}/" if under else ""), key=itemgetter(0))

    def names(self, under: str = "") -> Iterator[str]:
        """Stream the names below `under`, unsorted, without stat'ing files or holding all of them in memory."""
        if self.is_local:
            yield from self._checked(folder.names_below(self.root, under))
        else:
            yield from (entry.name for entry in self.starting(f"{under}/" if under else ""))

    def walk(self) -> Iterator[Entry]:
        """Stream all objects with modification times, sorted by name, without holding all of them in memory.

        Raises InputError if the folder or bucket does not exist, StoreError if part of it cannot be listed.
        """
        if self.is_local:
            yield from starmap(file_entry, self._checked(folder.walk_folder(self.root)))
        else:
            yield from starmap(Entry, self._pages("")) if self.is_s3 else self.list()

    def info(self, name: str) -> Entry | None:
        """The object called `name`, or None; folders do not count."""
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
        """Seconds since the epoch by the clock behind `modified`: the server's, or this machine's."""
        if not self.is_s3:
            return time.time()
        return self.attempt("list", "", lambda: buckets.clock(self.filesystem, self.root))

    def _below(self, under: str) -> Iterator[Entry]:
        if self.is_local:
            yield from starmap(file_entry, self._checked(folder.files_below(self.root, under)))
            return
        listing = self.attempt("list", under, lambda: self.filesystem.find(self.path(under), detail=True))
        base = len(self.path("").rstrip("/")) + 1
        yield from (self._entry(path[base:], info) for path, info in listing.items() if len(path) > base)

    def _pages(self, beginning: str) -> Iterator[tuple[str, int, str, float]]:
        token: str | None = ""
        start = f"{self.root.rstrip('/')}/{beginning}"
        while token is not None:
            page = partial(buckets.page, self.filesystem, start, token)
            objects, token = self.attempt("list", beginning.rstrip("/"), page)
            yield from buckets.entries(objects, self.root)

    def _checked(self, listing: Iterator[_T]) -> Iterator[_T]:
        try:
            yield from listing
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"cannot list {self.url}: not found") from None
        except OSError as error:
            raise StoreError(f"cannot list {self.url}: {line_of(error)}") from None

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        size = int(info.get("size") or 0)
        etag = info.get("ETag") or info.get("etag") or f"{size}-{info.get('mtime') or info.get('created') or ''}"
        return Entry(name, size, str(etag).strip('"'))


def file_entry(name: str, size: int, modified: float, changed: int, is_file: bool) -> Entry:
    """The entry for a local file as described by `folder`."""
    return _new(Entry, (name, size, f"{size}-{int(modified * 1e6)}-{changed}" if is_file else "", modified))
