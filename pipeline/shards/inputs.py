"""Resolve an input URL: a folder or prefix, one file, a glob, or a brace pattern; and list what will not be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from braceexpand import braceexpand

from pipeline.errors import InputError, Reason
from pipeline.layout import RUN_FOLDER
from pipeline.records import LooseImage, Rejection, Shard, shown
from pipeline.shards.loose import kept_suffixes, loose_images, units_of_images
from pipeline.shards.names import fault_of, is_image, is_of_the_system, is_shard, stem_of, unread
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store, file_at

_SIGNS = "*?[{"
_SHOWN = 5
_SHARD = "shard (*.tar, *.tar.gz) and no image"


class Listing(NamedTuple):
    """What an input URL refers to.

    shards       sorted by name; loose images in units, after the shards
    passed_over  objects that may contain images but are not read, with reasons
    others       names of objects that are neither shards, images nor sidecars of loose images; sorted
    """

    store: Store
    shards: list[Shard]
    passed_over: list[Rejection]
    others: Sequence[str] = ()

    @property
    def names(self) -> Iterator[str]:
        """Names of all files that are read."""
        for shard in self.shards:
            if shard.images:
                yield from (file.name for image in shard.images for file in image.files)
            else:
                yield shard.name


def said_of(passed_over: Sequence[Rejection]) -> str:
    """One line that counts and names what is not read; "" if nothing."""
    if not passed_over:
        return ""
    named = ", ".join(f"{rejection.key} ({rejection.detail})" for rejection in passed_over[:_SHOWN])
    more = ", …" if len(passed_over) > _SHOWN else ""
    return f"{len(passed_over):,} not read: {named}{more}"


def told_of_others(others: Sequence[str]) -> str:
    """One line that counts and names files that are neither read nor copied; "" if there are none."""
    if not others:
        return ""
    more = ", …" if len(others) > _SHOWN else ""
    return f"{len(others):,} files that are no images and no sidecars: {', '.join(map(shown, others[:_SHOWN]))}{more}"


def resolve_input(url: str, keep_sidecar: Collection[str] = ()) -> Listing:
    """Resolve an input URL to a store, its shards (.tar, .tar.gz, .tgz), and its loose images, in units.

    url           a prefix or folder, one file, a glob (`*`, `?`, `[…]`) or a webdataset brace pattern (`{000..127}`); a
                  name that exists literally is not treated as a pattern
    keep_sidecar  suffixes of files beside loose images that are sidecars, whatever they hold
    Raises InputError if there is neither, or if a name from a brace pattern is missing.
    """
    base, pattern = _split(url)
    if pattern:
        store = Store(base)
        matches = _braces(url, store, pattern) if "{" in pattern else store.glob(pattern)
        nothing = f"the pattern matches no {_SHARD}; quote it so that the shell does not expand it"
        return _listing(url, store, matches, lambda _: nothing, keep_sidecar)
    if is_shard(url) or is_image(url):
        store, name = file_at(url)
        entry = store.info(name)
        if entry is not None:
            return _listing(url, store, [entry], lambda _: f"no {_SHARD}", keep_sidecar)
    store = Store(url)
    return _listing(url, store, store.starting(), lambda count: _nothing(url, count), keep_sidecar)


def _nothing(url: str, count: int) -> str:
    if not count and is_shard(url):
        return "shard not found"
    seen = f"only {count} other objects" if count else "nothing there"
    return f"no shards (*.tar, *.tar.gz) found and no images, {seen}; check the path, or quote the pattern"


def _listing(
    url: str, store: Store, entries: Iterable[Entry], nothing: Callable[[int], str], keep: Collection[str]
) -> Listing:
    """Pick shards and loose images from entries.

    nothing  number of entries -> error message if none of them is a shard or an image
    """
    count, shards, loose, passed_over = 0, list[Shard](), list[Entry](), list[Rejection]()
    kept = kept_suffixes(keep)
    for entry in entries:
        count += 1
        if entry.name.startswith(f"{RUN_FOLDER}/") or is_of_the_system(entry.name):
            continue
        fault = _fault(store, entry, kept)
        if fault is not None:
            passed_over.append(Rejection(shown(entry.name), "", *fault))
        elif is_shard(entry.name):
            shards.append(Shard(entry.name, entry.size, entry.etag))
        else:
            loose.append(entry)
    passed_over.sort(key=lambda rejection: rejection.key)
    images, others = loose_images(loose, keep)
    if not shards and not images:
        also = f" ({said_of(passed_over)})" if passed_over else ""
        raise InputError(f"{url}: {nothing(count)}{also}")
    shards.sort(key=attrgetter("name"))
    return Listing(store, shards + units_of_images(images), passed_over, others)


def _fault(store: Store, entry: Entry, kept: tuple[str, ...]) -> tuple[Reason, str] | None:
    """Why an object that may contain images is passed over; None for what is read, and for what never contains any.

    kept  endings of sidecars, whatever they hold
    """
    name = entry.name
    if not entry.etag:
        path = store.path(name)
        if os.path.isdir(path):
            return Reason.NOT_A_FILE, "links to folders are not followed"
        kind = "a broken link" if os.path.islink(path) else "a fifo, a socket or a device"
        return Reason.NOT_A_FILE, kind
    if is_shard(name):
        return fault_of(name)
    if is_image(name):
        if not stem_of(name).rpartition("/")[2]:
            return Reason.UNUSABLE_NAME, "the name has nothing before its extension"
        return fault_of(name)
    return None if name.lower().endswith(kept) else unread(name)


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


def without_unwritable(
    listing: Listing, output: Store, longest: Callable[[str], str], written: Callable[[str], str] = str
) -> Listing:
    """The listing without shards and loose images whose names the output cannot hold; these are passed over.

    longest  shard name -> the longest name that is written for it
    written  name of a loose image -> its name in the output
    """
    shards, passed_over = list[Shard](), [*listing.passed_over]
    images = list[LooseImage]()
    names = {shard.name for shard in listing.shards if not shard.images}
    names |= {written(image.files[0].name) for shard in listing.shards for image in shard.images}
    first_of: dict[str, str] = {}  # name in the output, without its case -> the first that has it

    def fits(name: str, *outputs: str) -> bool:
        fault = next(filter(None, map(output.too_long, outputs)), "")
        if output.is_local and not fault:  # unlike a folder, an object store may hold both `a` and `a/b`
            above = (name[:at] for at, sign in enumerate(name) if sign == "/")
            there = next((folder for folder in above if folder in names), "")
            fault = f"{there} is {'a shard' if is_shard(there) else 'an image'}, not a folder" if there else ""
        if output.ignores_case and not fault:
            pairs = [(each, first_of.setdefault(each.casefold(), each)) for each in outputs]
            same = next((first for each, first in pairs if first != each), "")
            fault = f"it differs from {same} in case alone, and that disk ignores case" if same else ""
        if fault:
            passed_over.append(Rejection(name, "", Reason.UNUSABLE_NAME, f"in the output: {fault}"))
        return not fault

    for shard in listing.shards:
        if not shard.images and fits(shard.name, longest(shard.name)):
            shards.append(shard)
        for image in shard.images:
            first, *sidecars = (file.name for file in image.files)
            if fits(first, written(first), *sidecars):
                images.append(image)
    if not shards and not images:
        raise InputError(
            f"{listing.store.url}: none of its shards can be written to {output.url}: {said_of(passed_over)}"
        )
    return Listing(listing.store, shards + units_of_images(images), passed_over, listing.others)
