"""Holds a surrogate: one shard of encoded images in, one file of features out.

Given a protection (--protection), it also assigns every image to the nearest of its centroids.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from actors.cluster.batches import Batch, RunContext, ShardDone, done_columns, shards_of
from actors.cluster.metrics import actor_recorder, worker_name
from pipeline import layout
from pipeline.deltas.load import AnyProtection
from pipeline.errors import ScumbleError
from pipeline.metrics import SHARDS, ShardCounts, report_failure, report_shard
from pipeline.profile import Work
from pipeline.records import Shard
from pipeline.shards.samples import samples_of
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.features import Assignment, assignment_to_parquet, feature_keys, features_to_parquet
from pipeline.surrogates.surrogate import surrogate_for

BATCH = {"cpu": 32, "cuda": 256}  # pictures the surrogate sees at once


class Embedder:
    """Ray Data actor of the stage `embed`; can be built and called without Ray."""

    def __init__(self, context: RunContext, protection: AnyProtection | None = None) -> None:
        self.context = context
        self.metrics = actor_recorder("embed")
        self.protection = protection
        self.surrogate = surrogate_for(context.settings, context.device)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        try:
            return done_columns([self._embed(shard) for shard in shards_of(batch)])
        except ScumbleError as error:
            report_failure(self.metrics, "embed", error)
            raise

    def _embed(self, shard: Shard) -> ShardDone:
        """Embed one shard and write its features; the file is its own commit."""
        started, began = time.perf_counter(), time.time()
        settings, output = self.context.settings, self.context.output
        if output.info(layout.features(shard.name)) is not None:  # Ray asks again for what a dead worker had answered
            self.metrics.record(SHARDS, 1, stage="embed", state="skipped")
            images = len(feature_keys(output.read(layout.features(shard.name))))
            return ShardDone(shard.name, images, 0, shard.size, time.perf_counter() - started)
        features, rejections, spent = embed_shard(
            samples_of(self.context.source, shard, max_member_bytes=settings.max_member_bytes),
            self.surrogate,
            shard=shard.name,
            batch_size=BATCH[self.context.device],
            threads=self.context.threads,
            max_pixels=settings.max_pixels,
            exact_clock=settings.profile,
            keep_sidecar=settings.keep_sidecar,
        )
        data = features_to_parquet(features, surrogate_id=self.surrogate.id, fingerprint=self.context.fingerprint)
        assigned = drifted = 0
        if self.protection is not None:
            clusters, distance = self.protection.clustering.assign(features.values)
            assigned = len(clusters)
            drifted = int(np.count_nonzero(distance > self.protection.clustering.distance_p99[clusters]))
            assignment = Assignment(shard.name, features.keys, clusters, distance)
            output.create(layout.assignment(shard.name), assignment_to_parquet(assignment))
        put_started = time.perf_counter()
        output.create(layout.features(shard.name), data)
        elapsed = time.perf_counter() - started
        steps = spent.steps | {"put": time.perf_counter() - put_started}
        ahead = {"read": spent.read, "decode": spent.decode}
        reasons = Counter(rejection.reason.value for rejection in rejections)
        sizes = (shard.size, len(data))
        counts = ShardCounts(len(features.keys), reasons, *sizes, steps | ahead, elapsed, assigned, drifted)
        report_shard(self.metrics, "embed", counts)
        work = Work(worker_name(), began, began + elapsed, steps, ahead, self.context.threads)
        return ShardDone(shard.name, len(features.keys), len(rejections), shard.size, elapsed, work)
