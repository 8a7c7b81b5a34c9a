"""What object stores do by themselves, for a folder on disk: a listing in their order, a real compare-and-swap."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

Found = tuple[str, int, float, bool]  # name below the root, bytes, seconds since the epoch, whether it is a plain file


def walk_folder(root: str) -> Iterator[Found]:
    """Every file below `root`, in the order of their whole names, as an object store lists them.

    Links are not followed but named, as files that are none. What vanishes meanwhile is left out. Names of one
    folder are held at a time, and of those above it. Raises OSError, so that a part is never taken for the whole.
    """
    folders = [_children(root, "")]
    while folders:
        for name, entry, is_folder in folders[-1]:
            try:
                if is_folder:
                    folders.append(_children(entry.path, name))
                    break
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield name, found.st_size, found.st_mtime, stat.S_ISREG(found.st_mode)
        else:
            folders.pop()


def _children(folder: str, name: str) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
    """Of one folder, sorted; a folder's name is compared with the slash that follows it in whole names."""
    with os.scandir(folder) as entries:
        found = [
            (f"{name}{entry.name}/", entry, True)
            if entry.is_dir(follow_symlinks=False)
            else (name + entry.name, entry, False)
            for entry in entries
        ]
    found.sort(key=itemgetter(0))
    return iter(found)


def names_below(root: str, under: str) -> Iterator[str]:
    """Name below `root` of every file below its folder `under`, in no order; none where that is not there.

    No file is looked at. Links are not followed but named.
    """
    for name, _ in _below(root, under):
        yield name


def files_below(root: str, under: str) -> Iterator[Found]:
    """As names_below, with what a look at each file says: of a link, what it leads to, if that is there."""
    for name, entry in _below(root, under):
        try:
            found = entry.stat()
        except OSError:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
        yield name, found.st_size, found.st_mtime, True


def _below(root: str, under: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    waiting = [under]
    while waiting:
        name = waiting.pop()
        try:
            entries = os.scandir(os.path.join(root, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(below)
                else:
                    yield below, entry


def read(path: str) -> bytes:
    """All bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def moved(source: Path, target: Path) -> bool:
    """True if the file could be renamed; between two filesystems it has to be copied."""
    try:
        os.rename(source, target)
    except OSError:
        return False
    return True


def read_settled(path: str, etag: str, etag_of: Callable[[int, float], str]) -> bytes | None:
    """The bytes of a file if it is the version `etag` before and after they are read; None if not, or if it is gone.

    etag_of  (bytes, seconds since the epoch) -> etag
    """
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        data = file.read()
        after = os.fstat(file.fileno())
    now = os.stat(path)
    seen = {etag_of(one.st_size, one.st_mtime) for one in (before, after, now)}
    return data if seen == {etag} and len(data) == now.st_size and before.st_ino == now.st_ino else None


def look(path: str, scratch: Path) -> tuple[bytes, str, float]:
    """Content, its digest, and its age in seconds by the clock of the disk itself, which may be another machine's."""
    with open(path, "rb") as file:
        data = file.read()
        modified = os.fstat(file.fileno()).st_mtime
    return data, digest(data), clock(scratch) - modified


def clock(scratch: Path) -> float:
    """What time it is for a disk: the modification time of a file made now."""
    scratch.mkdir(parents=True, exist_ok=True)
    probe = scratch / f"clock-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def swap(path: str, wanted: str, lock: Path, publish: Callable[[], None]) -> bool:
    """Call `publish` if the file's content has the digest `wanted`; nobody else who swaps it comes between.

    The lock is the kernel's: it ends with the process that holds it, however that ends.
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
    """Version of a file's content: two writes within one tick of the clock differ too."""
    return hashlib.sha256(data).hexdigest()
