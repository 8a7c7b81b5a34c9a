"""Ray Data actor of the stage `label`: one shard in, the label of each of its samples written as its cluster."""

from __future__ import annotations

import time
from typing import Any

from actors.cluster.batches import Batch, RunContext, ShardDone, done_columns, shards_of
from pipeline import layout
from pipeline.baselines.labels import labelled, predicted
from pipeline.clusters.clustering import Head
from pipeline.records import Shard
from pipeline.relearning.labels.given import Classes
from pipeline.shards.samples import samples_of
from pipeline.surrogates.features import Assignment, assignment_to_parquet, features_from_parquet


class Labeller:
    """Reads labels, or takes those that a classifier predicts from the features; can be called without Ray.

    classes  as class_numbers finds them; None: one label for all
    head     of the surrogate; None: the labels of the samples
    """

    def __init__(self, context: RunContext, classes: Classes | None, head: Head | None = None) -> None:
        self.context, self.classes, self.head = context, classes, head

    def __call__(self, batch: Batch) -> dict[str, Any]:
        return done_columns([self._label(shard) for shard in shards_of(batch)])

    def _label(self, shard: Shard) -> ShardDone:
        started = time.perf_counter()
        assignment = self._assignment(shard)
        self.context.output.create(layout.assignment(shard.name), assignment_to_parquet(assignment))
        return ShardDone(shard.name, len(assignment.keys), 0, shard.size, time.perf_counter() - started)

    def _assignment(self, shard: Shard) -> Assignment:
        source, settings = self.context.source, self.context.settings
        if self.head is not None:
            return predicted(features_from_parquet(self.context.output.read(layout.features(shard.name))), self.head)
        return labelled(
            samples_of(source, shard, max_member_bytes=settings.max_member_bytes),
            shard.name,
            f"{source.url}/{shard.name}",
            self.classes,
            settings,
        )
