"""The input of a job that trains: which shards a URL means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs.shared import cli
from pipeline import layout
from pipeline.errors import InputError
from pipeline.packing.pack import PackRecord
from pipeline.records import Shard
from pipeline.runs.run_record import RunRecord
from pipeline.runs.totals import committed_units
from pipeline.shards.inputs import resolve_input, said_of
from pipeline.storage.store import Store


def list_input(url: str) -> tuple[Store, list[Shard]]:
    """The store, and the shards and units of loose images behind an input URL; warns about what is not read.

    Raises InputError, also for what an unfinished run has written so far.
    """
    listing = resolve_input(url)
    check_finished(listing.store, listing.shards)
    if listing.passed_over:
        cli.warn(f"{url}: {said_of(listing.passed_over)}")
    return listing.store, listing.shards


def list_labelled(url: str) -> tuple[Store, list[Shard]]:
    """Like list_input, for jobs that compare copies: loose images that a run wrote have the keys of their originals."""
    store, shards = list_input(url)
    if any(shard.images for shard in shards) and store.info(layout.RUN) is not None:
        there = {image.files[0].name for shard in shards for image in shard.images}
        shards = [shard for shard in shards if not shard.images]
        for unit in committed_units(store):
            images = tuple(image for image in unit.images if image.files[0].name in there)
            shards += [replace(unit, images=images)] if images else []
    return store, shards


def check_finished(store: Store, shards: Sequence[Shard]) -> None:
    """Raise InputError unless every run that writes here has committed all its shards: a part would pass for the whole.

    shards  those of the store that are to be read
    """
    for record, folder, name_of in (
        (RunRecord.read(store, layout.RUN), layout.COMMITS, layout.commit),
        (PackRecord.read(store, layout.PACK_RUN), layout.PACK_COMMITS, layout.pack_commit),
    ):
        if record is None:
            continue
        have = set(store.names(folder))
        without = [shard.name for shard in shards if not shard.images and name_of(shard.name) not in have]
        num_missing = max(len(without), record.num_shards - len(have))
        if num_missing > 0:
            example = f", e.g. {without[0]}" if without else ""
            raise InputError(
                f"{store.url}: {num_missing:,} of {record.num_shards:,} shards have no commit{example}: "
                "finish the run that writes them"
            )
