"""A store's location and how it is accessed: URL, fsspec filesystem, retries, one-line errors.

fsspec and s3fs find endpoint and credentials themselves (environment, profile); nothing here reads, keeps or prints
them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from pipeline.errors import InputError
from pipeline.storage.retries import retried

_T = TypeVar("_T")


class Location:
    """A prefix in object storage, or a folder. Pickles as its URL; connects where it is used.

    Raises InputError for an unknown URL scheme and for a name that is not UTF-8.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self._filesystem: Any = None
        protocol, _, path = self.url.rpartition("://")
        if not url.isprintable() and re.search("[\ud800-\udfff]", url):
            raise InputError(f"{ascii(url)}: the name is not UTF-8 and cannot be stored in records; rename it")
        self.is_local = protocol in ("", "file", "local")
        self.is_s3 = protocol in ("s3", "s3a")
        try:
            known = fsspec.get_filesystem_class(protocol or "file")
        except (ValueError, ImportError) as error:
            raise InputError(f"{url}: unknown or missing storage driver ({error})") from None
        self.root = os.path.abspath(path) if self.is_local else known._strip_protocol(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystem": None}

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem, created once per process because s3fs is not fork-safe."""
        if self._filesystem is None:
            protocol = "file" if self.is_local else self.url.rpartition("://")[0]
            self._filesystem = fsspec.filesystem(protocol, use_listings_cache=False)
        return self._filesystem

    def path(self, name: str) -> str:
        """Full path of `name` for the filesystem."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def attempt(self, verb: str, name: str, action: Callable[[], _T]) -> _T:
        """Run one storage call: retry transient failures, turn others into one-line errors."""
        where = f"cannot {verb} " + f"{self.url}/{name}".rstrip("/")
        missing = "no such bucket" if self.is_s3 and verb in ("list", "create", "write") else "not found"
        return retried(where, action, missing=missing)
