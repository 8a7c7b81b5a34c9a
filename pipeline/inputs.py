"""What an input URL means: a folder or prefix of shards, one shard, a glob, or a brace pattern."""

from __future__ import annotations

from braceexpand import braceexpand

from pipeline.errors import InputError
from pipeline.store import RUN_FOLDER, SHARD_SUFFIXES, Entry, Store, file_at


def resolve_input(url: str) -> tuple[Store, list[Entry]]:
    """The store and the shards (.tar, .tar.gz) that an input URL means, sorted by name.

    url  a prefix or folder, one shard, a glob (`*`, `?`, `[…]`) or a webdataset brace pattern (`{000..127}`)
    Raises InputError if nothing is there, if no shard is found, or if a name of a brace pattern is missing.
    """
    if "{" in url:
        return _from_braces(url)
    if any(sign in url for sign in "*?["):
        return _from_glob(url)
    if url.endswith(SHARD_SUFFIXES):
        store, name = file_at(url)
        entry = store.info(name)
        if entry is None:
            raise InputError(f"{url}: there is no such shard")
        return store, [entry]
    store = Store(url)
    everything = store.list()
    shards = [e for e in everything if e.name.endswith(SHARD_SUFFIXES) and not e.name.startswith(RUN_FOLDER + "/")]
    if not shards:
        seen = f"{len(everything)} other objects are there" if everything else "nothing is there"
        raise InputError(f"{url}: no shards (*.tar, *.tar.gz) found: {seen}; check the path, or quote your pattern")
    return store, shards


def _from_glob(url: str) -> tuple[Store, list[Entry]]:
    parts = url.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    store = Store("/".join(parts[:first]) or ".")
    pattern = "/".join(parts[first:])
    found = store._do("list", pattern, lambda: store.filesystem.glob(store.path(pattern), detail=True))
    base = len(store.root.rstrip("/")) + 1
    shards = [store._entry(path[base:], info) for path, info in found.items() if path.endswith(SHARD_SUFFIXES)]
    if not shards:
        raise InputError(f"{url}: the pattern matches no shard (*.tar, *.tar.gz); quote it so that the shell leaves it")
    return store, sorted(shards, key=lambda entry: entry.name)


def _from_braces(url: str) -> tuple[Store, list[Entry]]:
    try:
        wanted = list(braceexpand(url))
    except ValueError:
        raise InputError(f"{url}: unbalanced braces; a pattern looks like train-{{000..127}}.tar") from None
    folder = url[: url.index("{")].rpartition("/")[0]
    store = Store(folder or ".")
    there = {entry.name: entry for entry in store.list()}
    names = [one[len(folder) + 1 :] if folder else one for one in wanted]
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"{url}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
    return store, [there[name] for name in sorted(set(names))]
