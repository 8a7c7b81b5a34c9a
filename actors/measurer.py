"""Ray tasks that measure written shards and write small files of figures for the report."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from actors.cluster.batches import RunContext
from actors.cluster.tasks import over_tasks
from pipeline import layout
from pipeline.deltas.load import AnyProtection, load_protection
from pipeline.measures.gallery import gallery_to_bytes
from pipeline.measures.measure import ShardMeasures, measure_shard, measured_shards, removal_of
from pipeline.measures.scores import scores_to_parquet
from pipeline.records import Commit, Shard
from pipeline.shards.samples import samples_of
from pipeline.shards.tar import ANY_BYTES
from pipeline.surrogates.features import assignment_from_parquet

IMAGES_PER_TASK = 500  # to measure fewer takes less time than a worker needs to load torch


def measure_run(context: RunContext, shards: Sequence[Shard], key: bytes | None) -> None:
    """Measure a hash-sample of the shards; returns when the figures are written."""
    named = set(measured_shards([shard.name for shard in shards], context.settings.seed))
    chosen = [shard for shard in shards if shard.name in named]
    with ThreadPoolExecutor() as pool:  # here: a worker would start, and load torch, to read some small files
        images = [commit.num_protected for commit in pool.map(lambda shard: _commit(context, shard.name), chosen)]
    calls = [(context, group, key, sum(images)) for group in groups_of(chosen, images)]
    parts = dict(over_tasks(_measure, calls, cpus=1))
    for _ in over_tasks(_finish, [(context, key, *(parts[number] for number in range(len(calls))))], cpus=1):
        pass


def groups_of(shards: Sequence[Shard], images: Sequence[int]) -> list[list[Shard]]:
    """The shards that have images, in order, as many to a group as it takes to have 500 of them."""
    groups: list[list[Shard]] = []
    room = 0
    for shard, number in zip(shards, images, strict=True):
        if number == 0:  # of a unit whose images are all in quarantine nothing was written
            continue
        if room <= 0:
            groups.append([])
            room = IMAGES_PER_TASK
        groups[-1].append(shard)
        room -= number
    return groups


def _commit(context: RunContext, shard: str) -> Commit:
    name = layout.commit(shard)
    return Commit.from_bytes(context.output.read(name), f"{context.output.url}/{name}")


def _protection(context: RunContext, key: bytes | None) -> AnyProtection:
    protection = load_protection(context.output.read(layout.PROTECTION))
    return protection.with_key(key) if key is not None and protection.needs_key else protection


def _measure(context: RunContext, shards: Sequence[Shard], key: bytes | None, num_images: int) -> list[ShardMeasures]:
    torch.set_num_threads(1)
    protection = _protection(context, key)
    return [_measure_shard(context, shard, protection, num_images) for shard in shards]


def _measure_shard(context: RunContext, shard: Shard, protection: AnyProtection, num_images: int) -> ShardMeasures:
    assignment = assignment_from_parquet(context.output.read(layout.assignment(shard.name)))
    limit, written = context.settings.max_member_bytes, _commit(context, shard.name).written()
    return measure_shard(
        samples_of(context.output, written, max_member_bytes=ANY_BYTES, any_version=True),
        samples_of(context.source, shard, max_member_bytes=limit, any_version=True),
        assignment,
        protection,
        context.settings,
        num_images=max(num_images, 1),
    )


def _finish(context: RunContext, key: bytes | None, *groups: list[ShardMeasures]) -> None:
    """Pool the parts of all groups: scores, a gallery, and the removal check."""
    output, parts = context.output, [part for group in groups for part in group]
    output.put(layout.SCORES, scores_to_parquet(score for part in parts for score in part.scores))
    removal = removal_of(parts, _protection(context, key), context.settings) if parts else None
    if removal is not None:
        output.put(layout.REMOVAL, removal.to_bytes())
    output.put(layout.GALLERY, gallery_to_bytes(picture for part in parts for picture in part.shown))
