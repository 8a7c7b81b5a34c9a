"""Reading: an object, or exactly one version of it, so that nobody takes a changed object for the planned one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from pipeline.errors import InputError, StoreError
from pipeline.layout import RUN_FOLDER
from pipeline.storage import buckets, folder
from pipeline.storage.listings import Listings, file_entry
from pipeline.storage.streams import PatientReader


@dataclass(frozen=True)
class Seen:
    """An object's content, its version, and its age in seconds by the store's own clock."""

    data: bytes
    etag: str
    age_s: float


class Versions(Listings):
    """The objects of a store as they can be read; nothing is written."""

    def open(self, name: str) -> IO[bytes]:
        """A stream of the object's bytes, read ahead in blocks of 8 MiB; failed reads are retried."""
        stream: IO[bytes] = self.attempt(
            "open", name, lambda: self.filesystem.open(self.path(name), "rb", block_size=8 << 20)
        )
        return stream if self.is_local else cast(IO[bytes], PatientReader(stream, partial(self.attempt, "read", name)))

    def open_version(self, name: str, etag: str) -> IO[bytes]:
        """A stream of one version of an object.

        Raises InputError (changed-input) if the current version is another one.
        """
        self.check_version(name, etag)
        return self.open(name)

    def check_version(self, name: str, etag: str) -> None:
        """Raise InputError (changed-input) if the current version of an object is another one."""
        now = self.info(name)
        if now is None or now.etag != etag:
            seen = "is gone" if now is None else f"is now {now.etag}, but was planned as {etag}"
            raise InputError(f"changed-input: {self.url}/{name} {seen}; use a new --output to plan again")

    def read(self, name: str) -> bytes:
        """All bytes of an object. Raises InputError if it does not exist."""
        if self.is_local:  # fsspec takes twice as long for small files
            return self.attempt("read", name, partial(folder.read, self.path(name)))
        alone = {"max_concurrency": 1} if self.is_s3 else {}  # otherwise s3fs requests the size first
        data: bytes = self.attempt("read", name, lambda: self.filesystem.cat_file(self.path(name), **alone))
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """All bytes of an object, or None if it does not exist, in one request."""
        try:
            return self.read(name)
        except InputError:
            return None

    def read_if(self, name: str, etag: str) -> bytes | None:
        """All bytes of one version of an object; None if it is gone or changes while being read."""
        try:
            if self.is_local:
                return self.attempt("read", name, lambda: folder.read_settled(self.path(name), etag, _etag_of))
            if self.is_s3:
                got = self.attempt("read", name, lambda: buckets.get(self.filesystem, self.path(name), etag))
                return got[0] if got else None
            data = self.read(name)
        except InputError:
            return None
        now = self.info(name)
        return data if now is not None and now.etag == etag else None

    def read_version(self, name: str, etag: str) -> bytes:
        """All bytes of one version of an object.

        Raises InputError (changed-input) if the current version is another one, or changes meanwhile.
        """
        data = self.read_if(name, etag)
        if data is None:
            self.open_version(name, etag).close()  # says what has changed
            raise InputError(
                f"changed-input: {self.url}/{name} changes while it is read; run again once it is complete"
            )
        return data

    def read_with_etag(self, name: str) -> tuple[bytes, str] | None:
        """An object's content and the version that `replace_if` needs; None if it does not exist."""
        self._needs_conditions()
        if self.is_local:  # the content decides; to ask for its age takes the right to write
            data = self.read_if_there(name)
            return None if data is None else (data, folder.digest(data))
        seen = self.look(name)
        return None if seen is None else (seen.data, seen.etag)

    def look(self, name: str) -> Seen | None:
        """Like read_with_etag, with the object's age; a folder's clock is that of a file created now."""
        self._needs_conditions()
        try:
            if self.is_local:
                return Seen(*self.attempt("read", name, lambda: folder.read_seen(self.path(name), self._scratch)))
            got = self.attempt("read", name, lambda: buckets.get(self.filesystem, self.path(name)))
        except InputError:
            return None
        return Seen(*got) if got else None

    @property
    def _scratch(self) -> Path:
        return Path(self.root) / RUN_FOLDER / "scratch"

    def _needs_conditions(self) -> None:
        if not self.is_local and not self.is_s3:
            raise StoreError(f"{self.url}: only folders and s3:// can replace one version of an object")


def _etag_of(entry: folder.Found) -> str:
    return file_entry(*entry).etag
