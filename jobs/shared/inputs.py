"""The input of a job that trains: which shards a URL means."""

from __future__ import annotations

from jobs.shared import cli
from pipeline.shards.inputs import resolve_input, said_of
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store


def list_input(url: str) -> tuple[Store, list[Entry]]:
    """The store and the shards behind an input URL; warns about what is not read. Raises InputError."""
    store, shards, passed_over = resolve_input(url)
    if passed_over:
        cli.warn(f"{url}: {said_of(passed_over)}")
    return store, shards
