"""What an input URL means: a folder or prefix, one shard, a glob, or a brace pattern; and what of it is not read."""

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
_OTHER_ARCHIVES = re.compile(  # also the parts of one, and what was not downloaded to its end
    r"\.(tar\.([a-z]?z\d?|lz4|lzma|lzo|zstd?|bz|br|[0-9]+|part[0-9]*|gz\.(part)?[0-9]*|crdownload|aria2|tmp)"
    r"|t[bxlz]z2?|tb2|tzst|taz|zip|7z|rar|cpio)$"
)
_PICTURES = re.compile(r"\.(jpe?g|jfif|png|webp|tiff?|gif|bmp|heic|heif|avif|jp2|jxl)$")
_SHOWN = 5
_SHARD = "shard (*.tar, *.tar.gz)"


class Listing(NamedTuple):
    """The shards that an input URL means, sorted by name, and what it means too but nobody reads: reasons and names."""

    store: Store
    shards: list[Entry]
    passed_over: list[Rejection]


def said_of(passed_over: Sequence[Rejection]) -> str:
    """One line that counts and names what is not read; "" if that is nothing."""
    if not passed_over:
        return ""
    named = ", ".join(f"{one.key} ({one.detail})" for one in passed_over[:_SHOWN])
    more = ", …" if len(passed_over) > _SHOWN else ""
    return f"{len(passed_over):,} not read: {named}{more}"


def resolve_input(url: str) -> Listing:
    """The store and the shards (.tar, .tar.gz, .tgz) that an input URL means.

    url  a prefix or folder, one shard, a glob (`*`, `?`, `[…]`) or a webdataset brace pattern (`{000..127}`); what is
         there by that very name is no pattern
    Raises InputError if nothing is there, if no shard is found, or if a name of a brace pattern is missing.
    """
    base, pattern = _split(url)
    if pattern:
        store = Store(base)
        found = _braces(url, store, pattern) if "{" in pattern else store.glob(pattern)
        nothing = f"the pattern matches no {_SHARD}; quote it so that the shell leaves it"
        return _listing(url, store, found, lambda _: nothing)
    if is_shard(url):
        store, name = file_at(url)
        entry = store.info(name)
        if entry is not None:
            return _listing(url, store, [entry], lambda _: f"no {_SHARD}")
    store = Store(url)
    return _listing(url, store, store.starting(), lambda count: _nothing(url, count))


def _nothing(url: str, count: int) -> str:
    if not count and is_shard(url):
        return "there is no such shard"
    seen = f"{count} other objects are there" if count else "nothing is there"
    return f"no shards (*.tar, *.tar.gz) found: {seen}; check the path, or quote your pattern"


def _listing(url: str, store: Store, entries: Iterable[Entry], nothing: Callable[[int], str]) -> Listing:
    """The shards among entries, of which there may be many more. nothing  says that of so many entries none is one"""
    count, shards, passed_over = 0, list[Entry](), list[Rejection]()
    for entry in entries:
        count += 1
        if entry.name.startswith(f"{RUN_FOLDER}/") or entry.name.rpartition("/")[2].startswith("._"):
            continue  # a run's records; what a Mac notes beside a file
        fault = _fault(store, entry)
        if fault is not None:
            passed_over.append(Rejection(shown(entry.name), "", *fault))
        elif is_shard(entry.name):
            shards.append(entry)
    passed_over.sort(key=lambda one: one.key)
    if not shards:
        also = f" ({said_of(passed_over)})" if passed_over else ""
        raise InputError(f"{url}: {nothing(count)}{also}")
    return Listing(store, sorted(shards), passed_over)


def _fault(store: Store, entry: Entry) -> tuple[Reason, str] | None:
    """Why an object is passed over although it may hold images; None for a shard, and for what never holds any."""
    name = entry.name
    if not entry.etag:
        path = store.path(name)
        if os.path.isdir(path):
            return Reason.NOT_A_FILE, "a link to a folder is not followed"
        kind = "a link that leads nowhere" if os.path.islink(path) else "a fifo, a socket or a device"
        return Reason.NOT_A_FILE, kind
    if is_shard(name):
        return fault_of(name)
    if _OTHER_ARCHIVES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "pack it as .tar or .tar.gz"
    if _PICTURES.search(name.lower()):
        return Reason.UNSUPPORTED_FORMAT, "an image in no shard"
    return None


def _split(url: str) -> tuple[str, str]:
    """(folder, pattern) of a URL: the longest beginning that is there as it is spelled, or has no sign of a pattern.

    pattern  "" where the URL is that of a folder or of a file
    """
    parts = url.split("/")
    if "://" in url and any(sign in parts[2] for sign in _SIGNS):
        raise InputError(f"{url}: the name of a bucket cannot be a pattern")
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
        raise InputError(f"{url}: unbalanced braces; a pattern looks like train-{{000..127}}.tar") from None
    names = set(wanted)
    there = [entry for entry in store.starting(pattern.partition("{")[0]) if entry.name in names]
    missing = names - {entry.name for entry in there}
    if missing:
        first = next(name for name in wanted if name in missing)
        raise InputError(f"{url}: {len(missing)} of {len(names)} shards are missing, first {first}")
    return there


def without_unwritable(listing: Listing, output: Store, longest: Callable[[str], str]) -> Listing:
    """The same without shards that the output cannot hold: their names are passed over before a run starts.

    longest  name of a shard -> the longest of the names that are written for it
    """
    names, shards, passed_over = {one.name for one in listing.shards}, [], [*listing.passed_over]
    for entry in listing.shards:
        fault = output.too_long(longest(entry.name))
        if output.is_local and not listing.store.is_local:
            above = (entry.name[:at] for at, sign in enumerate(entry.name) if sign == "/")
            fault = fault or next((f"{one} is a shard, no folder" for one in above if one in names), "")
        if fault:
            passed_over.append(Rejection(entry.name, "", Reason.UNUSABLE_NAME, f"in the output: {fault}"))
        else:
            shards.append(entry)
    if not shards:
        raise InputError(f"{listing.store.url}: no shard can be written to {output.url}: {said_of(passed_over)}")
    return Listing(listing.store, shards, passed_over)
