"""The input of a job that trains: which shards a URL means."""

from __future__ import annotations

from jobs.shared import cli
from pipeline.errors import InputError
from pipeline.records import Shard
from pipeline.shards.inputs import resolve_input, said_of
from pipeline.storage.store import Store


def list_input(url: str) -> tuple[Store, list[Shard]]:
    """The store, and the shards and units of loose images behind an input URL; warns about what is not read.

    Raises InputError.
    """
    listing = resolve_input(url)
    if listing.passed_over:
        cli.warn(f"{url}: {said_of(listing.passed_over)}")
    return listing.store, listing.shards


def list_shards(url: str) -> tuple[Store, list[Shard]]:
    """Like list_input, for jobs that need labels: loose images are not read. Raises InputError if there is no shard."""
    store, found = list_input(url)
    shards = [shard for shard in found if not shard.images]
    loose = sum(len(shard.images) for shard in found)
    if not shards:
        raise InputError(f"{url}: {loose:,} loose images, but no shards: pack them into shards with labels first")
    if loose:
        cli.warn(f"{url}: {loose:,} loose images are not read: pack them into shards with labels")
    return store, shards
