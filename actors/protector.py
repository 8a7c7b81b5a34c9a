"""Holds a protection: one shard in, one committed shard out, by the transaction of `pipeline.runs.transaction`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from actors.cluster.batches import Batch, RunContext, Secret, ShardDone, done_columns, shards_of
from actors.cluster.metrics import actor_recorder, worker_name
from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, ShardOutcome, protect_shard, write_protected
from pipeline.deltas.keyed import KeyedDeltas
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.picture_deltas import SampleDeltas, protect_pictures
from pipeline.deltas.samplewise.base import BATCH
from pipeline.errors import ScumbleError
from pipeline.metrics import CONFLICTS, SHARDS, ShardCounts, report_failure, report_shard
from pipeline.profile import Work
from pipeline.records import Commit, Rejection, Sample, Shard
from pipeline.runs.transaction import ShardTransaction
from pipeline.shards.samples import SampleWriter
from pipeline.surrogates.features import assignment_from_parquet


class Protector:
    """Ray Data actor of the stage `apply`; can be built and called without Ray."""

    def __init__(self, context: RunContext, secret: Secret | None = None) -> None:
        self.context = context
        self.metrics = actor_recorder("apply")
        torch.set_num_threads(context.threads)
        protection = load_cluster_protection(context.output.read(layout.PROTECTION))
        if protection.needs_key and secret is not None and secret.key is not None:
            protection = protection.with_key(secret.key)
        self.transaction = transaction_of(context, protection.sha256)
        self.epsilon = protection.epsilon
        self.deltas: LaidDeltas | SampleDeltas | None
        if protection.generator == "keyed":
            self.deltas = None  # each shard has its own
        elif protection.needs_pixels:
            self.deltas = SampleDeltas(protection, None, context.device)
        else:
            self.deltas = LaidDeltas(protection)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        return done_columns([self._protect(shard) for shard in shards_of(batch)])

    def _protect(self, shard: Shard) -> ShardDone:
        started = time.perf_counter()
        try:
            if (existing := self.transaction.committed(shard)) is not None:
                self.metrics.record(SHARDS, 1, stage="apply", state="skipped")
                return self._done(shard, existing, started)
            commit, others_were_first = self.transaction.run(shard, partial(self._outcome, shard))
        except ScumbleError as error:
            report_failure(self.metrics, "apply", error)
            raise
        if others_were_first:
            self.metrics.record(CONFLICTS, 1, stage="apply", outcome="equal")
        done = self._done(shard, commit, started)
        sizes = (commit.input_size, commit.output_size)
        counts = ShardCounts(commit.num_protected, commit.quarantine, *sizes, commit.seconds, done.seconds)
        report_shard(self.metrics, "apply", counts)
        return done

    def _outcome(self, shard: Shard, samples: Iterator[Sample | Rejection], writer: SampleWriter) -> ShardOutcome:
        """Step 3: the clusters are known, because earlier stages have assigned every image."""
        clusters, settings = self._clusters(shard), self.context.settings
        deltas = self.deltas or self._keyed(shard)
        if isinstance(deltas, LaidDeltas):
            return protect_shard(samples, writer, deltas, clusters, settings=settings)
        made = protect_pictures(
            samples,
            deltas,
            settings=settings,
            batch_size=BATCH[self.context.device],
            threads=self.context.threads,
            clusters=clusters,
        )
        return write_protected(
            (result if isinstance(result, Rejection) else (result.done, result.cluster) for result in made), writer
        )

    def _keyed(self, shard: Shard) -> LaidDeltas:
        """The deltas of the shard's samples, which lie beside the protection."""
        output, name = self.context.output, layout.keyed_deltas(shard.name)
        data = output.read_if_there(name)
        if data is None:  # none of its samples can be protected
            return LaidDeltas(KeyedDeltas.none(self.epsilon))
        return LaidDeltas(KeyedDeltas.from_bytes(data, self.epsilon, f"{output.url}/{name}"))

    def _clusters(self, shard: Shard) -> dict[str, int]:
        """The cluster of every embedded sample of the shard, by key."""
        assignment = assignment_from_parquet(self.context.output.read(layout.assignment(shard.name)))
        return dict(zip(assignment.keys, assignment.clusters.tolist(), strict=True))

    def _done(self, shard: Shard, commit: Commit, started: float) -> ShardDone:
        seconds, ended = time.perf_counter() - started, time.time()
        work = Work(worker_name(), ended - seconds, ended, commit.seconds)
        return ShardDone(shard.name, commit.num_protected, commit.num_quarantined, shard.size, seconds, work)


def transaction_of(context: RunContext, protection_sha256: str) -> ShardTransaction:
    """How the shards of a run are committed."""
    limit, encode = context.settings.max_member_bytes, context.settings.encode
    return ShardTransaction(context.source, context.output, context.fingerprint, protection_sha256, limit, encode)
