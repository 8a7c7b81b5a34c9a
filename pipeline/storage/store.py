"""All access to storage: reads, writes, and conditional writes.

Every failure becomes a one-line StoreError or InputError. `versions` reads, `listings` lists; `location` says where a
store is, and `retries` makes a call again.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

from pipeline.errors import InputError, SettingsError
from pipeline.layout import RUN_FOLDER
from pipeline.storage import buckets, folder
from pipeline.storage.bounded import bounded_map
from pipeline.storage.versions import Versions

MAX_KEY_BYTES = 1024  # S3's limit
DELETED_AT_ONCE = 16
LEFT_SECONDS = 3600.0  # after which nobody writes to a scratch file any more


class Store(Versions):
    """A prefix in object storage, or a folder. Pickles as its URL; connects where it is used.

    Raises InputError for an unknown URL scheme and for a name that is not UTF-8.
    """

    def replace_if(self, name: str, data: bytes, etag: str) -> str | None:
        """Replace the version of an object seen by `look`; returns the new version, or None if it has changed.

        If the response was lost, the object is read back, so `data` should be unique.
        """
        self._needs_conditions()
        if self.is_local:
            lock = self._scratch / f"{folder.digest(name.encode())[:16]}.lock"
            publish = partial(self._publish, name, data, os.replace)
            swapped = self.attempt("replace", name, lambda: folder.swap(self.path(name), etag, lock, publish))
            return folder.digest(data) if swapped else None
        try:
            return self.attempt("replace", name, lambda: buckets.replace(self.filesystem, self.path(name), data, etag))
        except InputError:
            return None

    def put(self, name: str, data: bytes, content_type: str | None = None) -> None:
        """Write an object atomically, replacing any existing one."""
        if self.is_local:
            self.attempt("write", name, lambda: self._publish(name, data, os.replace))
        else:
            options = {"ContentType": content_type} if content_type and self.is_s3 else {}
            self.attempt("write", name, lambda: self.filesystem.pipe_file(self.path(name), data, **options))

    def put_file(self, name: str, source: Path) -> None:
        """Upload a local file atomically; the local file may be gone afterwards."""
        if self.is_local:
            self.attempt("write", name, lambda: self._publish(name, source, os.replace))
        else:
            self.attempt("write", name, lambda: self.filesystem.put_file(str(source), self.path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Create an object if it does not exist; True if we created it.

        If the response was lost, the object is read back: equal bytes count as ours.
        """
        try:
            if self.is_local:
                self.attempt("create", name, lambda: self._publish(name, data, folder.link))
            else:
                self.attempt("create", name, lambda: buckets.create(self.filesystem, self.path(name), data))
            return True
        except FileExistsError:
            return False

    def honours_create(self) -> bool:
        """True if creating an existing object is refused; some stores ignore the condition."""
        name = f"{RUN_FOLDER}/probe-{uuid.uuid4().hex}"
        first = self.create(name, b"1")  # if this fails, there is nothing to delete
        try:
            return first and not self.create(name, b"2")
        finally:
            self.delete([name])

    def sweep(self) -> None:
        """Remove scratch files that nobody has written to for an hour: writers that were killed have left them."""
        if self.is_local:
            self.attempt("delete", str(self._scratch), lambda: folder.sweep(self._scratch, LEFT_SECONDS))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, several at a time; missing ones are ignored."""
        with ThreadPoolExecutor(DELETED_AT_ONCE) as pool:
            deque(bounded_map(pool, self._delete, names, ahead=2 * DELETED_AT_ONCE), maxlen=0)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(InputError):
            self.attempt("delete", name, partial(self.filesystem.rm_file, self.path(name)))

    def _publish(self, name: str, content: bytes | Path, publish: Callable[[str, str], None]) -> None:
        """Write to a scratch file, flush it to disk, then make it appear under its real name atomically."""
        target = Path(self.path(name))
        self.check_folder(name.rpartition("/")[0])
        made = folder.make(target.parent)
        self._scratch.mkdir(parents=True, exist_ok=True)
        temporary, moved = self._scratch / uuid.uuid4().hex, False
        try:
            moved = isinstance(content, Path) and folder.moved(content, temporary)
            with temporary.open("ab") as out:
                if isinstance(content, bytes):
                    out.write(content)
                elif not moved:
                    with content.open("rb") as source:
                        while block := source.read(8 << 20):
                            out.write(block)
                out.flush()
                os.fsync(out.fileno())
            publish(str(temporary), str(target))
            folder.sync(made)  # the directory entry, which a crash could otherwise lose
        except OSError:
            if moved and isinstance(content, Path):  # for the next attempt
                folder.moved(temporary, content)
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def check_folder(self, name: str) -> None:
        """Raise SettingsError if a folder of this store is a link that leads out of it, perhaps to originals."""
        real, root = os.path.realpath(self.path(name)), os.path.realpath(self.root)
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise SettingsError(f"{self.path(name)} leads to {real}, outside {self.root}: remove that link")

    def too_long(self, name: str) -> str:
        """Why the store's limits prevent writing an object with this name; "" if they do not."""
        path = self.path(name)
        if not self.is_local:
            size = len(path.partition("/")[2].encode())
            return f"a key of {size:,} bytes exceeds the limit of {MAX_KEY_BYTES:,}" if size > MAX_KEY_BYTES else ""
        part, whole = self._longest
        size, asked = max(len(component.encode()) for component in name.split("/")), len(path.encode())
        if size > part:
            return f"a name of {size:,} bytes exceeds the limit of {part:,}"
        return f"a path of {asked:,} bytes exceeds the limit of {whole:,}" if asked > whole else ""

    @cached_property
    def ignores_case(self) -> bool:
        """True if names that differ in case alone seem to be one file there, as on the disks of Macs and Windows."""
        return self.is_local and folder.ignores_case(self.root)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Maximum bytes of a file name and of a path on the folder's file system."""
        return folder.longest(self.root)


def file_at(url: str) -> tuple[Store, str]:
    """The store and object name for the URL or path of a file."""
    folder, slash, name = url.rpartition("/")
    return Store(folder or slash or "."), name
