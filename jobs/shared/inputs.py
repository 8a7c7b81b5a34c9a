"""The input of a job that trains: which shards a URL means."""

from __future__ import annotations

from dataclasses import replace

from jobs.shared import cli
from pipeline import layout
from pipeline.errors import InputError
from pipeline.records import Shard
from pipeline.runs.totals import committed_units
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


def list_labelled(url: str) -> tuple[Store, list[Shard]]:
    """Like list_input, for jobs that compare copies: loose images that a run wrote have the keys of their originals.

    Raises InputError as well if a run wrote loose images there, but has not committed any.
    """
    store, shards = list_input(url)
    if any(shard.images for shard in shards) and store.info(layout.RUN) is not None:
        there = {image.files[0].name for shard in shards for image in shard.images}
        shards = [shard for shard in shards if not shard.images]
        for unit in committed_units(store):
            images = tuple(image for image in unit.images if image.files[0].name in there)
            shards += [replace(unit, images=images)] if images else []
        if not shards:
            raise InputError(f"{url}: a run was started there, but has committed no image: run it to its end first")
    return store, shards
