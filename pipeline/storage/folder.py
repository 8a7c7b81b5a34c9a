"""What object stores provide, for a folder on disk: listings in byte order, compare-and-swap."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

# name below the root, bytes, mtime in seconds, ctime in microseconds (which, unlike mtime, cannot be set, so a replaced
# file always differs), whether it is a regular file
Found = tuple[str, int, float, int, bool]

_OF_THE_DISK = ("lost+found", "System Volume Information", "$RECYCLE.BIN", ".Trashes", ".fseventsd", ".Spotlight-V100")


def walk_folder(root: str) -> Iterator[Found]:
    """Every file below `root`, sorted by full name as in an object store.

    Links are not followed but listed as non-regular files. Files that vanish meanwhile are omitted. Only the names of
    the current folder and those above it are held in memory. Raises OSError rather than returning a partial listing.
    """
    folders = [_children(root, "")]
    while folders:
        for name, entry, is_folder in folders[-1]:
            try:
                if is_folder:
                    folders.append(_children(entry.path, name))
                    break
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield _found(name, seen)
        else:
            folders.pop()


@contextlib.contextmanager
def _scanned(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """The entries of a folder; none of what a file system keeps for itself at its root, if we may not look there."""
    try:
        entries = os.scandir(folder)
    except PermissionError:
        if os.path.basename(folder.rstrip("/")) not in _OF_THE_DISK:
            raise
        yield iter(())
        return
    with entries:
        yield entries


def _children(folder: str, name: str) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
    """Entries of one folder, sorted as in full names: a folder's name compares with its trailing slash."""
    with _scanned(folder) as entries:
        children = [
            (f"{name}{entry.name}/", entry, True)
            if entry.is_dir(follow_symlinks=False)
            else (name + entry.name, entry, False)
            for entry in entries
        ]
    children.sort(key=itemgetter(0))
    return iter(children)


def names_below(root: str, under: str) -> Iterator[str]:
    """Names, relative to `root`, of all files below its folder `under`, unsorted; empty if that does not exist.

    Files are not stat'ed. Links are not followed but listed.
    """
    for name, _ in _below(root, under):
        yield name


def files_below(root: str, under: str) -> Iterator[Found]:
    """Like names_below, with a stat of each file; for a link, of its target if that exists."""
    for name, entry in _below(root, under):
        try:
            seen = entry.stat()
        except OSError:
            try:
                seen = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
        yield _found(name, seen)


def _below(root: str, under: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    waiting = [under]
    while waiting:
        name = waiting.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _scanned(os.path.join(root, name)) as entries:
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(below)
                else:
                    yield below, entry


def lookup(path: str, name: str) -> Found:
    """Stat one file. Raises FileNotFoundError for a folder."""
    seen = os.stat(path)
    if stat.S_ISDIR(seen.st_mode):
        raise FileNotFoundError(path)
    return _found(name, seen)


def _found(name: str, seen: os.stat_result) -> Found:
    return name, seen.st_size, seen.st_mtime, seen.st_ctime_ns // 1000, stat.S_ISREG(seen.st_mode)


def make(folder: Path) -> list[Path]:
    """Create a folder; returns the folders to sync after adding a file: it, and the parents of newly created ones."""
    fresh = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [folder, *(parent.parent for parent in fresh)]


def sync(folders: list[Path]) -> None:
    """Flush directory entries to disk; some network file systems cannot and need not."""
    for folder in folders:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(opened)


def link(source: str, target: str) -> None:
    """Hard-link a file unless the target exists. Raises FileExistsError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        what = "this file system has no hard links, which commits need: choose an --output on another one"
        raise OSError(errno.ENOTSUP, what) from error


def ignores_case(root: str) -> bool:
    """True if the nearest existing folder, or an empty one itself, is found under its name in the other case as well.

    Nothing is written to find out; of an empty disk nothing is known, and it is taken to mind the case.
    """
    there = Path(root).absolute()
    while not there.is_dir():
        there = there.parent
    with contextlib.suppress(OSError):
        with os.scandir(there) as entries:
            known = [Path(entry.path) for entry in entries]
        while not os.path.ismount(there):
            known.append(there)
            there = there.parent
        for path in known:
            if (other := path.with_name(path.name.swapcase())) != path:
                return other.exists() and os.path.samefile(path, other)
    return False


def longest(folder: str) -> tuple[int, int]:
    """Maximum length in bytes of a file name and of a path, on a folder's file system."""
    there = next(str(parent) for parent in (Path(folder), *Path(folder).parents) if parent.is_dir())
    return os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX") - 1


def read(path: str) -> bytes:
    """All bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def moved(source: Path, target: Path) -> bool:
    """True if the file could be renamed; across file systems it has to be copied."""
    try:
        os.rename(source, target)
    except OSError:
        return False
    return True


def read_settled(path: str, etag: str, etag_of: Callable[[Found], str]) -> bytes | None:
    """A file's contents if its version is `etag` both before and after reading; otherwise None."""
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not block if it has become a fifo
    try:
        before = os.fstat(opened)
        if not stat.S_ISREG(before.st_mode):
            return None
        data = os.read(opened, before.st_size + 1)  # in one call, if it is small
        while len(data) < before.st_size and (more := os.read(opened, before.st_size + 1 - len(data))):
            data += more
        after = os.fstat(opened)
    finally:
        os.close(opened)
    now = os.stat(path)
    same = _version(before) == _version(after) == _version(now) and len(data) == now.st_size
    return data if same and etag_of(_found("", now)) == etag else None


def _version(seen: os.stat_result) -> tuple[int, ...]:
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def read_seen(path: str, scratch: Path) -> tuple[bytes, str, float]:
    """Content, digest, and age in seconds by the disk's clock, which may be another machine's."""
    with open(path, "rb") as file:
        data = file.read()
        modified = os.fstat(file.fileno()).st_mtime
    return data, digest(data), clock(scratch) - modified


def clock(scratch: Path) -> float:
    """A disk's current time: the modification time of a file created now."""
    scratch.mkdir(parents=True, exist_ok=True)
    probe = scratch / f"clock-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sweep(scratch: Path, older_than_s: float) -> None:
    """Remove what killed writers have left; locks stay, because deleting one that is held would free it."""
    if not scratch.is_dir():
        return
    now = clock(scratch)
    for path in scratch.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ".lock" and now - path.stat().st_mtime > older_than_s:
                path.unlink()


def swap(path: str, wanted: str, lock: Path, publish: Callable[[], None]) -> bool:
    """Call `publish` if the file's content has the digest `wanted`, atomically with respect to other swaps.

    It is a kernel lock, released when the process that holds it ends, however it ends.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            with open(path, "rb") as file:
                same = digest(file.read()) == wanted
        except FileNotFoundError:
            return False
        if same:
            publish()
        return same


def digest(data: bytes) -> str:
    """Version of a file's content; also distinguishes two writes within one clock tick."""
    return hashlib.sha256(data).hexdigest()
