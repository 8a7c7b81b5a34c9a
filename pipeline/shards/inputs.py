"""Resolve an input URL: a folder or prefix, one shard, a glob, or a brace pattern; and list what will not be read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from braceexpand import braceexpand

from pipeline.errors import InputError, Reason
from pipeline.layout import RUN_FOLDER
from pipeline.records import Rejection, shown
from pipeline.shards.names import fault_of, is_shard
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store, file_at

_SIGNS = "*?[{"
_OTHER_ARCHIVES = re.compile(  # including split archives and incomplete downloads
    r"\.(tar\.([a-z]?z\d?|lz4|lzma|lzo|zstd?|bz|br|[0-9]+|part[0-9]*|gz\.(part)?[0-9]*|crdownload|aria2|tmp)"
    r"|t[bxlz]z2?|tb2|tzst|taz|zip|7z|rar|cpio)$"
)
_PICTURES = re.compile(r"\.(jpe?g|jfif|png|webp|tiff?|gif|bmp|heic|heif|avif|jp2|jxl)$")
_SHOWN = 5
_SHARD = "shard (*.tar, *.tar.gz)"


class Listing(NamedTuple):
    """What an input URL refers to.

    shards       sorted by name
    passed_over  objects that may contain images but are not read, with reasons
    """

    store: Store
    shards: list[Entry]
    passed_over: list[Rejection]


def said_of(passed_over: Sequence[Rejection]) -> str:
    """One line that counts and names what is not read; "" if nothing."""
    if not passed_over:
        return ""
    named = ", ".join(f"{rejection.key} ({rejection.detail})" for rejection in passed_over[:_SHOWN])
    more = ", …" if len(passed_over) > _SHOWN else ""
    return f"{len(passed_over):,} not read: {named}{more}"


def resolve_input(url: str) -> Listing:
    """Resolve an input URL to a store and its shards (.tar, .tar.gz, .tgz).

    url  a prefix or folder, one shard, a glob (`*`, `?`, `[…]`) or a webdataset brace pattern (`{000..127}`); a name
         that exists literally is not treated as a pattern
    Raises InputError if no shard is found, or if a name from a brace pattern is missing.
    """
    base, pattern = _split(url)
    if pattern:
        store = Store(base)
        matches = _braces(url, store, pattern) if "{" in pattern else store.glob(pattern)
        nothing = f"the pattern matches no {_SHARD}; quote it so that the shell does not expand it"
        return _listing(url, store, matches, lambda _: nothing)
    if is_shard(url):
        store, name = file_at(url)
        entry = store.info(name)
        if entry is not None:
            return _listing(url, store, [entry], lambda _: f"no {_SHARD}")
    store = Store(url)
    return _listing(url, store, store.starting(), lambda count: _nothing(url, count))


def _nothing(url: str, count: int) -> str:
    if not count and is_shard(url):
        return "shard not found"
    seen = f"only {count} other objects" if count else "nothing there"
    return f"no shards (*.tar, *.tar.gz) found, {seen}; check the path, or quote the pattern"


def _listing(url: str, store: Store, entries: Iterable[Entry], nothing: Callable[[int], str]) -> Listing:
    """Pick the shards from entries, which may be far more numerous.

    nothing  number of entries -> error message if none of them is a shard
    """
    count, shards, passed_over = 0, list[Entry](), list[Rejection]()
    for entry in entries:
        count += 1
        if entry.name.startswith(f"{RUN_FOLDER}/") or entry.name.rpartition("/")[2].startswith("._"):
            continue  # a run's records; macOS metadata
        fault = _fault(store, entry)
        if fault is not None:
            passed_over.append(Rejection(shown(entry.name), "", *fault))
        elif is_shard(entry.name):
            shards.append(entry)
    passed_over.sort(key=lambda rejection: rejection.key)
    if not shards:
        also = f" ({said_of(passed_over)})" if passed_over else ""
        raise InputError(f"{url}: {nothing(count)}{also}")
    return Listing(store, sorted(shards), passed_over)


def _fault(store: Store, entry: Entry) -> tuple[Reason, str] | None:
    """Why an object that may contain images is passed over; None for shards, and for objects that never contain any."""
    name = entry.name
    if not entry.etag:
        path = store.path(name)
        if os.path.isdir(path):
            return Reason.NOT_A_FILE, "links to folders are not followed"
        kind = "a broken link" if os.path.islink(path) else "a fifo, a socket or a device"
        return Reason.NOT_A_FILE, kind
    if is_shard(name):
        return fault_of(name)
    if _OTHER_ARCHIVES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "repack it as .tar or .tar.gz"
    if _PICTURES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "an image outside any shard"
    return None


def _split(url: str) -> tuple[str, str]:
    """(folder, pattern) of a URL; folder is the longest prefix that exists literally or contains no wildcards.

    pattern  "" if the URL is that of a folder or file
    """
    parts = url.split("/")
    if "://" in url and any(sign in parts[2] for sign in _SIGNS):
        raise InputError(f"{url}: a bucket name cannot be a pattern")
    for end in range(len(parts), 0, -1):
        folder = "/".join(parts[:end])
        if not any(sign in folder for sign in _SIGNS) or _is_there(folder):
            return folder or "/", "/".join(parts[end:])
    return ".", url


def _is_there(url: str) -> bool:
    store, name = file_at(url)
    if store.is_local:
        return os.path.lexists(store.path(name))
    return next(Store(url).names(), None) is not None or store.info(name) is not None


def _braces(url: str, store: Store, pattern: str) -> list[Entry]:
    try:
        wanted = list(braceexpand(pattern))
    except ValueError:
        raise InputError(f"{url}: unbalanced braces; write patterns like train-{{000..127}}.tar") from None
    names = set(wanted)
    there = [entry for entry in store.starting(pattern.partition("{")[0]) if entry.name in names]
    missing = names - {entry.name for entry in there}
    if missing:
        first = next(name for name in wanted if name in missing)
        raise InputError(f"{url}: {len(missing)} of {len(names)} shards are missing, e.g. {first}")
    return there


def without_unwritable(listing: Listing, output: Store, longest: Callable[[str], str]) -> Listing:
    """The listing without shards whose names the output cannot hold; these are passed over.

    longest  shard name -> the longest name that is written for it
    """
    names, shards, passed_over = {shard.name for shard in listing.shards}, [], [*listing.passed_over]
    for entry in listing.shards:
        fault = output.too_long(longest(entry.name))
        if output.is_local and not listing.store.is_local:
            above = (entry.name[:at] for at, sign in enumerate(entry.name) if sign == "/")
            fault = fault or next((f"{folder} is a shard, not a folder" for folder in above if folder in names), "")
        if fault:
            passed_over.append(Rejection(entry.name, "", Reason.UNUSABLE_NAME, f"in the output: {fault}"))
        else:
            shards.append(entry)
    if not shards:
        raise InputError(
            f"{listing.store.url}: none of its shards can be written to {output.url}: {said_of(passed_over)}"
        )
    return Listing(listing.store, shards, passed_over)
