"""What object stores do by themselves, for a folder on disk: a listing in their order, a real compare-and-swap."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

# name below the root, bytes, seconds since the epoch, microseconds of the last change of the inode (which nobody can
# set back, as a copy with its times is: a replaced file is another one), whether it is a plain file
Found = tuple[str, int, float, int, bool]


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
            yield _found(name, found)
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
        yield _found(name, found)


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


def lookup(path: str, name: str) -> Found:
    """What a look at one file says. Raises FileNotFoundError for a folder."""
    seen = os.stat(path)
    if stat.S_ISDIR(seen.st_mode):
        raise FileNotFoundError(path)
    return _found(name, seen)


def _found(name: str, seen: os.stat_result) -> Found:
    return name, seen.st_size, seen.st_mtime, seen.st_ctime_ns // 1000, stat.S_ISREG(seen.st_mode)


def make(folder: Path) -> list[Path]:
    """Make a folder; which ones hold a new name once a file is put there: it, and those that new folders lie in."""
    fresh = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [folder, *(one.parent for one in fresh)]


def sync(folders: list[Path]) -> None:
    """Flush the names in folders to disk; some filesystems over a network cannot and need not."""
    for one in folders:
        opened = os.open(one, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(opened)


def link(source: str, target: str) -> None:
    """Give a file a second name if there is none of that name yet. Raises FileExistsError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        what = "this filesystem has no hard links, which commits need: choose an --output on another one"
        raise OSError(errno.ENOTSUP, what) from error


def longest(folder: str) -> tuple[int, int]:
    """Bytes of the longest file name, and of the longest path, that the disk of a folder takes."""
    there = next(str(one) for one in (Path(folder), *Path(folder).parents) if one.is_dir())
    return os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX") - 1


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


def read_settled(path: str, etag: str, etag_of: Callable[[Found], str]) -> bytes | None:
    """The bytes of a file if it is the version `etag` before and after they are read; None if not, or if it is gone."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # what became a fifo must not be waited for
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            return None
        data = file.read()
        after = os.fstat(file.fileno())
    now = os.stat(path)
    seen = {etag_of(_found("", one)) for one in (before, after, now)}
    return data if seen == {etag} and len(data) == now.st_size and before.st_ino == now.st_ino else None


def read_seen(path: str, scratch: Path) -> tuple[bytes, str, float]:
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
