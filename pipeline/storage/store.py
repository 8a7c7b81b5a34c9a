"""The one door to storage: list, read, put and create-if-absent on a local path or any fsspec URL.

Every failure leaves as a StoreError or InputError of one line. Endpoint and credentials are found by fsspec and
s3fs themselves (environment, profile); nothing here reads, keeps or prints them.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.utils import glob_translate

from pipeline.errors import InputError, SettingsError, StoreError
from pipeline.layout import RUN_FOLDER
from pipeline.storage import buckets, folder
from pipeline.storage.failures import advice_for, line_of, may_pass
from pipeline.storage.streams import PatientReader

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")  # in any case of letters
MAX_KEY_BYTES = 1024  # of S3
_ATTEMPTS = 5
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


@dataclass(frozen=True)
class Seen:
    """An object's content with the word for exactly this version, and its age in seconds by the store's own clock."""

    data: bytes
    etag: str
    age_s: float


class Store:
    """A prefix in object storage or a folder. Pickles as its URL; connects where it is used.

    Raises InputError for a URL scheme that is not known, and for a name that is not UTF-8.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self._filesystem: Any = None
        self._longest: tuple[int, int] | None = None
        protocol, _, path = self.url.rpartition("://")
        if not url.isprintable() and re.search("[\ud800-\udfff]", url):
            raise InputError(f"{ascii(url)}: the name is not UTF-8, so that no record could hold it; rename it")
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
        """The fsspec filesystem, made once per process; s3fs is not fork-safe."""
        if self._filesystem is None:
            protocol = "file" if self.is_local else self.url.rpartition("://")[0]
            self._filesystem = fsspec.filesystem(protocol, use_listings_cache=False)
        return self._filesystem

    def path(self, name: str) -> str:
        """Full path of `name` as the filesystem wants it."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def glob(self, pattern: str) -> Iterator[Entry]:
        """What a pattern (`*`, `?`, `[…]`, `**`) matches, with an etag of "" for what is no plain file."""
        if self.is_s3:
            matches = re.compile(self._do("list", pattern, lambda: glob_translate(pattern))).match
            yield from (entry for entry in self.starting(re.split(r"[*?[]", pattern)[0]) if matches(entry.name))
            return
        below = re.sub(r"([*?[])", r"[\1]", self.path("").rstrip("/"))  # signs in the root's own name are none
        found = self._do("list", pattern, lambda: self.filesystem.glob(f"{below}/{pattern}", detail=True))
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

    def _below(self, under: str) -> Iterator[Entry]:
        if self.is_local:
            yield from starmap(_file_entry, self._checked(folder.files_below(self.root, under)))
            return
        found = self._do("list", under, lambda: self.filesystem.find(self.path(under), detail=True))
        base = len(self.path("").rstrip("/")) + 1
        yield from (self._entry(path[base:], info) for path, info in found.items() if len(path) > base)

    def walk(self) -> Iterator[Entry]:
        """Every object with its time, in the order of names, page by page: never all of them in memory.

        Raises InputError if there is no such folder or bucket, StoreError if a part cannot be listed.
        """
        if self.is_local:
            yield from starmap(_file_entry, self._checked(folder.walk_folder(self.root)))
        else:
            yield from starmap(Entry, self._pages("")) if self.is_s3 else self.list()

    def _pages(self, beginning: str) -> Iterator[tuple[str, int, str, float]]:
        token: str | None = ""
        start = f"{self.root.rstrip('/')}/{beginning}"
        while token is not None:
            page = partial(buckets.page, self.filesystem, start, token)
            objects, token = self._do("list", beginning.rstrip("/"), page)
            yield from buckets.entries(objects, self.root)

    def _checked(self, found: Iterator[_T]) -> Iterator[_T]:
        try:
            yield from found
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"cannot list {self.url}: it is not there") from None
        except OSError as error:
            raise StoreError(f"cannot list {self.url}: {line_of(error)}") from None

    def clock(self) -> float:
        """Seconds since the epoch by the clock that `modified` is told by: the server's, or this machine's."""
        if not self.is_s3:
            return time.time()
        return self._do("list", "", lambda: buckets.clock(self.filesystem, self.root))

    def info(self, name: str) -> Entry | None:
        """The object called `name`, or None; a folder is none."""
        try:
            if self.is_local:
                return self._do("look up", name, lambda: _file_entry(*folder.lookup(self.path(name), name)))
            if self.is_s3:
                return Entry(name, *self._do("look up", name, lambda: buckets.head(self.filesystem, self.path(name))))
            info = self._do("look up", name, lambda: self.filesystem.info(self.path(name)))
            return self._entry(name, info) if info.get("type") != "directory" else None
        except InputError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """A stream of the object's bytes, read ahead in blocks of 8 MiB; a read that fails on the way is repeated."""
        stream: IO[bytes] = self._do(
            "open", name, lambda: self.filesystem.open(self.path(name), "rb", block_size=8 << 20)
        )
        return stream if self.is_local else cast(IO[bytes], PatientReader(stream, partial(self._do, "read", name)))

    def open_version(self, name: str, etag: str) -> IO[bytes]:
        """A stream of one version of an object.

        Raises InputError (changed-input) if it is not the version that was planned.
        """
        now = self.info(name)
        if now is None or now.etag != etag:
            seen = "is gone" if now is None else f"is now {now.etag}, planned as {etag}"
            raise InputError(f"changed-input: {self.url}/{name} {seen}; start again with a new --output to plan anew")
        return self.open(name)

    def read(self, name: str) -> bytes:
        """All bytes of an object. Raises InputError if it is not there."""
        if self.is_local:  # fsspec takes twice as long for small files
            return self._do("read", name, partial(folder.read, self.path(name)))
        alone = {"max_concurrency": 1} if self.is_s3 else {}  # otherwise s3fs asks for the size first
        data: bytes = self._do("read", name, lambda: self.filesystem.cat_file(self.path(name), **alone))
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """All bytes of an object, or None if there is none, in one request."""
        try:
            return self.read(name)
        except InputError:
            return None

    def read_if(self, name: str, etag: str) -> bytes | None:
        """All bytes of one version of an object; None if it is gone, or another one before they are all read."""
        try:
            if self.is_local:
                return self._do("read", name, lambda: folder.read_settled(self.path(name), etag, _etag_of))
            if self.is_s3:
                got = self._do("read", name, lambda: buckets.get(self.filesystem, self.path(name), etag))
                return got[0] if got else None
            data = self.read(name)
        except InputError:
            return None
        now = self.info(name)
        return data if now is not None and now.etag == etag else None

    def look(self, name: str) -> Seen | None:
        """An object that `replace_if` may replace; None if it is not there."""
        self._needs_conditions()
        try:
            if self.is_local:
                return Seen(*self._do("read", name, lambda: folder.read_seen(self.path(name), self._scratch)))
            got = self._do("read", name, lambda: buckets.get(self.filesystem, self.path(name)))
        except InputError:
            return None
        return Seen(*got) if got else None

    def replace_if(self, name: str, data: bytes, etag: str) -> str | None:
        """Replace one version of an object, as `look` has seen it; the new version, or None if it is another by now.

        An answer that was lost on the way is cleared up by reading back, so that `data` should be unlike any other.
        """
        self._needs_conditions()
        if self.is_local:
            lock = self._scratch / f"{folder.digest(name.encode())[:16]}.lock"
            publish = partial(self._publish, name, data, os.replace)
            swapped = self._do("replace", name, lambda: folder.swap(self.path(name), etag, lock, publish))
            return folder.digest(data) if swapped else None
        try:
            return self._do("replace", name, lambda: buckets.replace(self.filesystem, self.path(name), data, etag))
        except InputError:
            return None

    def put(self, name: str, data: bytes, content_type: str | None = None) -> None:
        """Write an object whole, replacing what was there; no reader ever sees a part of it."""
        if self.is_local:
            self._do("write", name, lambda: self._publish(name, data, os.replace))
        else:
            options = {"ContentType": content_type} if content_type and self.is_s3 else {}
            self._do("write", name, lambda: self.filesystem.pipe_file(self.path(name), data, **options))

    def put_file(self, name: str, source: Path) -> None:
        """Upload a local file whole; it may have been moved away afterwards."""
        if self.is_local:
            self._do("write", name, lambda: self._publish(name, source, os.replace))
        else:
            self._do("write", name, lambda: self.filesystem.put_file(str(source), self.path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of that name; True if it was us.

        An answer that was lost on the way is cleared up by reading back: equal bytes count as ours.
        """
        try:
            if self.is_local:
                self._do("create", name, lambda: self._publish(name, data, folder.link))
            else:
                self._do("create", name, lambda: buckets.create(self.filesystem, self.path(name), data))
            return True
        except FileExistsError:
            return False

    def honours_create(self) -> bool:
        """True if a second create of one name is refused; some stores ignore the condition."""
        name = f"{RUN_FOLDER}/probe-{uuid.uuid4().hex}"
        first = self.create(name, b"1")  # where that fails, there is nothing to delete
        try:
            return first and not self.create(name, b"2")
        finally:
            self.delete([name])

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        for name in names:
            try:
                self._do("delete", name, partial(self.filesystem.rm_file, self.path(name)))
            except InputError:
                continue

    def _publish(self, name: str, content: bytes | Path, publish: Callable[[str, str], None]) -> None:
        """Write beside the run's records, flush to disk, then appear under the real name in one step."""
        target = Path(self.path(name))
        self.check_folder(name.rpartition("/")[0])
        made = folder.make(target.parent)
        self._scratch.mkdir(parents=True, exist_ok=True)
        temporary = self._scratch / uuid.uuid4().hex
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
            folder.sync(made)  # the new name itself, which a crash would take back
        finally:
            temporary.unlink(missing_ok=True)

    def check_folder(self, name: str) -> None:
        """Raise SettingsError if a folder of this store is a link that leads out of it: originals may lie there."""
        real, root = os.path.realpath(self.path(name)), os.path.realpath(self.root)
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise SettingsError(f"{self.path(name)} leads to {real}, out of {self.root}: remove that link")

    def too_long(self, name: str) -> str:
        """Why an object of this name cannot be written, by the store's own limits; "" if it can."""
        path = self.path(name)
        if not self.is_local:
            size = len(path.partition("/")[2].encode())
            return f"a key of {size:,} bytes, {MAX_KEY_BYTES:,} are allowed" if size > MAX_KEY_BYTES else ""
        if self._longest is None:
            self._longest = folder.longest(self.root)
        part, whole = self._longest
        size, asked = max(len(one.encode()) for one in name.split("/")), len(path.encode())
        if size > part:
            return f"a name of {size:,} bytes, a folder there can hold {part:,}"
        return f"a path of {asked:,} bytes, {whole:,} are allowed" if asked > whole else ""

    @property
    def _scratch(self) -> Path:
        return Path(self.root) / RUN_FOLDER / "scratch"

    def _needs_conditions(self) -> None:
        if not self.is_local and not self.is_s3:
            raise StoreError(f"{self.url}: only folders and s3:// can replace one version of an object")

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        size = int(info.get("size") or 0)
        etag = info.get("ETag") or info.get("etag") or f"{size}-{info.get('mtime') or info.get('created') or ''}"
        return Entry(name, size, str(etag).strip('"'))

    def _do(self, verb: str, name: str, action: Callable[[], _T]) -> _T:
        """Run one storage call: retry what may pass, turn what may not into one line."""
        where = f"cannot {verb} " + f"{self.url}/{name}".rstrip("/")
        for attempt in range(_ATTEMPTS):  # s3fs itself retries throttling and 5xx within each
            try:
                return action()
            except FileExistsError:
                raise
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                what = "no such bucket" if self.is_s3 and verb in ("list", "create", "write") else "it is not there"
                raise InputError(f"{where}: {what}") from None
            except ValueError as error:  # before anything is sent: an endpoint, a region or a key that cannot be
                raise SettingsError(f"{where}: {line_of(error)}{advice_for(error)}") from None
            except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
                passing = may_pass(error)
                if attempt == _ATTEMPTS - 1 or not passing:
                    failure = StoreError(f"{where}: {line_of(error)}{advice_for(error)}")
                    failure.may_pass = passing
                    raise failure from None
                time.sleep(min(0.2 * 4**attempt, 10))
        raise AssertionError("unreachable")


def _file_entry(name: str, size: int, modified: float, changed: int, is_file: bool) -> Entry:
    return _new(Entry, (name, size, f"{size}-{int(modified * 1e6)}-{changed}" if is_file else "", modified))


def _etag_of(found: folder.Found) -> str:
    return _file_entry(*found).etag


def file_at(url: str) -> tuple[Store, str]:
    """The store and the name in it that the URL or path of one file means."""
    folder, slash, name = url.rpartition("/")
    return Store(folder or slash or "."), name
