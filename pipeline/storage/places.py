"""Detect an output that is the input under another name, comparing folders by identity and buckets by content.

Links, `..`, bind mounts, case-insensitive names and bucket aliases can all spell the same place in two ways.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

from pipeline.errors import InputError, SettingsError, StoreError
from pipeline.layout import RUN_FOLDER
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store

_MOUNTS = Path("/proc/self/mountinfo")


def check_apart(
    source: Store, output: Store, shards: Iterable[str] = (), *, may_hold: bool = False, what: str = "--input"
) -> None:
    """Raise SettingsError if the output is no folder, is the input, is inside it, or contains it; writes nothing.

    shards    names, if known: none may be a link into the output, and their folders in the output must not be links
              that lead out of it
    what      the input, as the command calls it
    may_hold  True if the input may be inside the output, which then only receives files with other names
    """
    check_is_folder(output)
    if source.is_local and output.is_local:
        ours, theirs = _path_of(output.root), _path_of(source.root)
        touching = bool(theirs[0] & set().union(*ours)) or not may_hold and bool(ours[0] & set().union(*theirs))
        if not touching:
            _check_links(source, output, ours[0], shards)
    else:
        touching = source.is_local == output.is_local and _share_keys(source, output, may_hold=may_hold)
    if touching:
        raise SettingsError(
            f"--output {output.url} and {what} {source.url} overlap: originals are never overwritten; "
            "choose another --output"
        )


def check_is_folder(output: Store) -> None:
    """Raise SettingsError if a file, or a link to nothing, stands where the output or a folder above it should be."""
    if not output.is_local:
        return
    there = next(path for path in (Path(output.root), *Path(output.root).parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SettingsError(f"--output {output.url}: {there} is not a folder; choose another --output")


def _path_of(folder: str) -> list[set[Hashable]]:
    """The folder and each of its parents, each as a set of identities: real path, inode, and location on its device.

    A bind-mounted folder keeps its inode but has different parents; its location on the device reveals the original
    ones.
    """
    real = os.path.realpath(folder)
    identities: list[set[Hashable]] = [_known_by(real)]
    device, place = _place_on_device(real)
    for above in Path(real).parents:
        identities.append(_known_by(str(above)))
    identities += [{(device, str(above))} for above in Path(place).parents if device]
    identities[0] |= {(device, place)} if device else set()
    return identities


def _known_by(real: str) -> set[Hashable]:
    try:
        seen = os.stat(real)
    except OSError:
        return {real}
    return {real, (seen.st_dev, seen.st_ino)}


def _place_on_device(real: str) -> tuple[str, str]:
    """("major:minor", path below the device's root); ("", "") if the kernel does not say."""
    try:
        rows = [line.split(" ", 5)[2:5] for line in _MOUNTS.read_text("utf-8", "surrogateescape").splitlines()]
    except OSError:
        return "", ""
    best = ("", "", "")
    for device, root, mounted in rows:
        at = _unescaped(mounted)
        if len(at) >= len(best[2]) and (real + "/").startswith(at.rstrip("/") + "/"):  # later mounts hide earlier ones
            best = device, _unescaped(root), at
    device, root, at = best
    return device, os.path.normpath(f"{root.rstrip('/')}/{real[len(at) :].lstrip('/')}") if device else ""


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _check_links(source: Store, output: Store, ours: set[Hashable], shards: Iterable[str]) -> None:
    folders: set[str] = set()
    for name in shards:
        folders.add(name.rpartition("/")[0])
        path = source.path(name)
        if os.path.islink(path) and ours & set().union(*_path_of(path)):
            raise SettingsError(
                f"--input {path} is a link into --output {output.url}: originals are never overwritten; "
                "choose another --output"
            )
    for folder in sorted(folders | {RUN_FOLDER}):
        output.check_folder(folder)


def _share_keys(source: Store, output: Store, *, may_hold: bool) -> bool:
    """True if one prefix contains the other and both are in the same bucket, even under different names."""
    ours, theirs = (f"{store.root.rstrip('/')}/" for store in (output, source))
    if output.is_s3 and source.is_s3 and ours.partition("/")[0] != theirs.partition("/")[0]:
        if not _is_alias(source, output):
            return False
        ours, theirs = ours.partition("/")[2], theirs.partition("/")[2]
    return ours.startswith(theirs) or not may_hold and theirs.startswith(ours)


def _is_alias(source: Store, output: Store) -> bool:
    """True if the input's first object is also in the output's bucket, with the same etag and time."""
    try:
        first = next(source.walk(), None)
        key = source.path(first.name).partition("/")[2] if first else ""
        seen = Store(f"s3://{output.root.partition('/')[0]}").info(key) if key else None
        return first is not None and seen is not None and _version(first) == _version(seen)
    except (InputError, StoreError):
        return False  # we may lack read access to another bucket


def _version(entry: Entry) -> tuple[int, str, int]:
    return entry.size, entry.etag, int(entry.modified)  # whole seconds, because not every API returns fractions
