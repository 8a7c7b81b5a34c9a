"""Ray tasks that measure written shards and write small files of figures for the report."""

from __future__ import annotations

import ray
import torch

from actors.cluster.batches import RunContext
from pipeline import layout
from pipeline.deltas.load import AnyProtection, load_protection
from pipeline.measures.gallery import gallery_to_bytes
from pipeline.measures.measure import ShardMeasures, measure_shard, measured_shards, removal_of
from pipeline.measures.scores import scores_to_parquet
from pipeline.records import Commit
from pipeline.surrogates.features import assignment_from_parquet

TASK_SECONDS = 3600


def measure_run(context: RunContext, names: list[str], key: bytes | None) -> None:
    """Measure a hash-sample of the shards in `names`; returns when the figures are written."""
    chosen = measured_shards(names, context.settings.seed)
    measure, finish = (ray.remote(num_cpus=1)(task) for task in (_measure, _finish))
    num_images = sum(
        ray.get([ray.remote(num_cpus=0.25)(_count).remote(context, name) for name in chosen], timeout=TASK_SECONDS)
    )
    parts = [measure.remote(context, name, key, num_images) for name in chosen]
    ray.get(finish.remote(context, key, *parts), timeout=TASK_SECONDS)


def _count(context: RunContext, shard: str) -> int:
    name = layout.commit(shard)
    return Commit.from_bytes(context.output.read(name), f"{context.output.url}/{name}").num_protected


def _protection(context: RunContext, key: bytes | None) -> AnyProtection:
    protection = load_protection(context.output.read(layout.PROTECTION))
    return protection.with_key(key) if key is not None and protection.needs_key else protection


def _measure(context: RunContext, shard: str, key: bytes | None, num_images: int) -> ShardMeasures:
    torch.set_num_threads(1)
    assignment = assignment_from_parquet(context.output.read(layout.assignment(shard)))
    with context.output.open(shard) as output, context.source.open(shard) as source:
        return measure_shard(
            output,
            source,
            assignment,
            _protection(context, key),
            context.settings,
            num_images=max(num_images, 1),
        )


def _finish(context: RunContext, key: bytes | None, *parts: ShardMeasures) -> None:
    """Pool the parts: scores, a gallery, and the removal check."""
    output = context.output
    output.put(layout.SCORES, scores_to_parquet(score for part in parts for score in part.scores))
    removal = removal_of(list(parts), _protection(context, key), context.settings)
    if removal is not None:
        output.put(layout.REMOVAL, removal.to_bytes())
    output.put(layout.GALLERY, gallery_to_bytes(picture for part in parts for picture in part.shown))
