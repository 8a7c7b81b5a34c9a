"""Ray Train worker that computes the deltas of a published protection, and writes them and the protection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from actors.cluster.batches import RunContext
from actors.cluster.tasks import objects_of
from pipeline import layout
from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.fit import baseline_protection, checked_deltas, keyed_by_shard, largest_change, sharded_pictures
from pipeline.baselines.methods import baseline
from pipeline.baselines.settings import BaselineRunSettings
from pipeline.baselines.trained.checkpoints import Checkpoints
from pipeline.clusters.clustering import Clustering
from pipeline.deltas.keyed import KeyedDeltas
from pipeline.errors import ConflictError, PromiseError
from pipeline.hashing import sha256
from pipeline.storage.store import Store

UNIT = "baseline"
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class BaselineTask:
    """What the worker needs besides the context of the run.

    images  references to Arrow tables of pictures in the object store
    queue   handle of a FitQueue
    side    of pictures and deltas, pixels
    labels  that occur in the collection
    """

    context: RunContext
    settings: BaselineRunSettings
    clustering: Clustering
    surrogate_id: str
    images: list[Any]
    queue: Any
    side: int
    labels: tuple[int, ...]


def baseline_loop(task: BaselineTask, device: str) -> None:
    """The loop of the Ray Train worker: compute, write, done. What it writes last, the protection, says that it is."""
    torch.set_num_threads(task.context.settings.fit_threads)
    name = str(ray.get_runtime_context().get_placement_group_id())
    if ray.get(task.queue.take.remote("0", name), timeout=ANSWER_SECONDS) is None:
        return

    def told(share: float) -> None:
        task.queue.tell.remote(UNIT, min(share, 0.999))

    tables = [table for table in objects_of(task.images) if table.num_rows]
    write_deltas(task, tables, device, told)
    ray.get(task.queue.tell.remote(UNIT, 1.0), timeout=ANSWER_SECONDS)


def write_keyed(output: Store, shard: str, deltas: KeyedDeltas) -> str:
    """Write the deltas of a shard's samples; returns their digest.

    Raises ConflictError if an earlier fit, on another kind of machine, has left others.
    """
    name, data = layout.keyed_deltas(shard), deltas.to_bytes()
    if not output.create(name, data) and output.read(name) != data:
        raise ConflictError(
            f"{output.url}/{name} holds deltas that this machine does not reproduce: delete the folder that it is in, "
            "or go on where the fit began"
        )
    return sha256(data)


def write_deltas(task: BaselineTask, tables: Sequence[pa.Table], device: str, told: Told) -> None:
    """Compute deltas on pictures as FitImageReader gives them; write those of each shard, and the protection.

    Raises PromiseError if a label has no picture: its delta would be none.
    """
    settings, output, method = task.settings, task.context.output, baseline(task.settings.method, task.settings.network)
    found = sharded_pictures(tables, side=task.side)
    if missing := sorted(set(task.labels).difference(found.pictures.labels.tolist())):
        raise PromiseError(f"label {missing[0]} has no picture to compute a delta on")
    name = layout.BASELINE_CHECKPOINT
    checkpoints = Checkpoints(output.read_if_there(name), partial(output.put, name), where=f"{output.url}/{name}")
    how = BaselineSettings(settings.epsilon, settings.seed, device.partition(":")[0], settings.effort, checkpoints)
    levels = checked_deltas(method, found.pictures, len(task.clustering.centroids), how, told)
    epsilon = settings.epsilon if settings.is_bounded else largest_change(levels)
    keyed = keyed_by_shard(found, levels, epsilon).items() if method.per_sample else ()
    digests = {shard: write_keyed(output, shard, deltas) for shard, deltas in keyed}
    protection = baseline_protection(
        settings,
        task.clustering,
        epsilon=epsilon,
        surrogate_id=task.surrogate_id,
        fingerprint=task.context.fingerprint,
        levels=None if method.per_sample else levels,
        digests=digests,
        figures={"bound": method.bound, "source": method.source, "effort": settings.effort, "side": task.side}
        | {"fit": dict(method.figures)},
    )
    output.create(layout.PROTECTION, protection.to_bytes())
    output.delete([name])
