"""Packs or unpacks shards: one in, one committed out, by the transaction of `pipeline.packing`."""

from __future__ import annotations

import time
from typing import Any

from actors.cluster.batches import Batch, ShardDone, done_columns, shards_of
from actors.cluster.metrics import worker_name
from pipeline.packing.pack import Packing
from pipeline.packing.unpack import Unpacking
from pipeline.profile import Work
from pipeline.records import Shard


class Packer:
    """Ray Data actor; can be built and called without Ray."""

    def __init__(self, task: Packing | Unpacking) -> None:
        self._task = task

    def __call__(self, batch: Batch) -> dict[str, Any]:
        return done_columns([self._done(shard) for shard in shards_of(batch)])

    def _done(self, shard: Shard) -> ShardDone:
        started = time.time()
        commit = self._task.run(shard)
        ended = time.time()
        work = Work(worker_name(), started, ended, {})
        return ShardDone(shard.name, commit.num_images, commit.num_quarantined, shard.size, ended - started, work)
