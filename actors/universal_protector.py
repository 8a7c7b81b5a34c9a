"""Holds a universal generator and its surrogate: one shard in, one committed shard out, in the same transaction.

It needs no earlier stage: every image is embedded here, and its nearest centroid is written beside the shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from actors.cluster.batches import RunContext
from actors.cluster.metrics import actor_recorder
from actors.protector import Protector, transaction_of
from pipeline import layout
from pipeline.deltas.apply import ProtectedSample, ShardOutcome, write_protected
from pipeline.deltas.load import load_universal_protection
from pipeline.deltas.picture_deltas import protect_pictures
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.records import Rejection, Sample, Shard
from pipeline.shards.samples import SampleWriter
from pipeline.surrogates.features import Assignment, assignment_to_parquet
from pipeline.surrogates.surrogate import surrogate_for

BATCH = {"cpu": 32, "cuda": 256}  # pictures the generator sees at once


class UniversalProtector(Protector):
    """Ray Data actor of the stage `apply` of One for All; can be built and called without Ray."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.metrics = actor_recorder("apply")
        torch.set_num_threads(context.threads)
        protection = load_universal_protection(context.output.read(layout.PROTECTION))
        settings = context.settings
        surrogate = surrogate_for(settings, context.device)
        self.transaction = transaction_of(context, protection.sha256)
        self.universal = UniversalDeltas(protection, surrogate, small_images=settings.small_images)

    def _outcome(self, shard: Shard, samples: Iterator[Sample | Rejection], writer: SampleWriter) -> ShardOutcome:
        keys: list[str] = []
        nearest: list[tuple[int, float]] = []

        def noted() -> Iterator[tuple[ProtectedSample, int] | Rejection]:
            for result in protect_pictures(
                samples,
                self.universal,
                settings=self.context.settings,
                batch_size=BATCH[self.context.device],
                threads=self.context.threads,
            ):
                if isinstance(result, Rejection):
                    yield result
                    continue
                keys.append(result.done.sample.key)
                nearest.append((result.cluster, result.distance))
                yield result.done, result.cluster

        outcome = write_protected(noted(), writer)
        clusters, distances = (np.array(column) for column in zip(*nearest, strict=True)) if nearest else ([], [])
        assignment = Assignment(
            shard.name, tuple(keys), np.asarray(clusters, np.int32), np.asarray(distances, np.float32)
        )
        self.context.output.put(layout.assignment(shard.name), assignment_to_parquet(assignment))
        return outcome
