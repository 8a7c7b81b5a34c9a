"""Holds a protection: one shard in, one committed shard out, in a transaction of six steps.

1 a commit exists: done          4 the output grows in local scratch, hashed while it is written
2 open the planned version       5 put output, put quarantine, create the commit
3 protect sample by sample       6 only the commit makes the output count
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from actors.cluster.batches import Batch, RunContext, Secret, ShardDone, done_columns, shards_of
from actors.cluster.metrics import actor_recorder, worker_name
from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, ShardOutcome, protect_shard, write_protected
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.picture_deltas import SampleDeltas, protect_pictures
from pipeline.deltas.sample_steps import BATCH
from pipeline.errors import ScumbleError, StoreError
from pipeline.metrics import CONFLICTS, SHARDS, ShardCounts, report_failure, report_shard
from pipeline.profile import Work
from pipeline.records import Commit, Rejection, Sample, Shard, quarantine_to_bytes
from pipeline.runs.commits import check_same_commit
from pipeline.shards.tar import ShardWriter, is_packed, read_samples
from pipeline.surrogates.features import assignment_from_parquet


class Protector:
    """Ray Data actor of the stage `apply`; can be built and called without Ray."""

    def __init__(self, context: RunContext, secret: Secret | None = None) -> None:
        self.context = context
        self.metrics = actor_recorder("apply")
        torch.set_num_threads(context.threads)
        protection = load_cluster_protection(context.output.read(layout.PROTECTION))
        if secret is not None and secret.key is not None:
            protection = protection.with_key(secret.key)
        self.protection_sha256 = protection.sha256
        self.deltas: LaidDeltas | SampleDeltas
        if protection.needs_pixels:
            self.deltas = SampleDeltas(protection, None, context.device)
        else:
            self.deltas = LaidDeltas(protection)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        return done_columns([self._protect(shard) for shard in shards_of(batch)])

    def _protect(self, shard: Shard) -> ShardDone:
        started = time.perf_counter()
        try:
            if (existing := self._committed(shard)) is not None:
                self.metrics.record(SHARDS, 1, stage="apply", state="skipped")
                return self._done(shard, existing, started)
            done = self._done(shard, commit := self._transaction(shard), started)
        except ScumbleError as error:
            report_failure(self.metrics, "apply", error)
            raise
        sizes = (commit.input_size, commit.output_size)
        counts = ShardCounts(commit.num_protected, commit.quarantine, *sizes, commit.seconds, done.seconds)
        report_shard(self.metrics, "apply", counts)
        return done

    def _transaction(self, shard: Shard) -> Commit:
        with scratch_for(shard) as scratch:
            path = scratch / "shard"
            with (
                self.context.source.open_version(shard.name, shard.etag) as stream,
                ShardWriter(path, compressed=is_packed(shard.name)) as writer,
            ):
                samples = read_samples(stream, max_member_bytes=self.context.settings.max_member_bytes)
                outcome = self._outcome(shard, samples, writer)
            put_started = time.perf_counter()
            self.context.output.put_file(shard.name, path)
            seconds = dict(outcome.seconds) | {"put": time.perf_counter() - put_started}
        return self._commit(shard, writer, outcome, seconds)

    def _outcome(self, shard: Shard, samples: Iterator[Sample | Rejection], writer: ShardWriter) -> ShardOutcome:
        """Step 3: the clusters are known, because earlier stages have assigned every image."""
        clusters, settings = self._clusters(shard), self.context.settings
        if isinstance(self.deltas, LaidDeltas):
            return protect_shard(samples, writer, self.deltas, clusters, settings=settings)
        made = protect_pictures(
            samples,
            self.deltas,
            settings=settings,
            batch_size=BATCH[self.context.device],
            threads=self.context.threads,
            clusters=clusters,
        )
        return write_protected((one if isinstance(one, Rejection) else (one.done, one.cluster) for one in made), writer)

    def _commit(self, shard: Shard, writer: ShardWriter, outcome: ShardOutcome, seconds: dict[str, float]) -> Commit:
        """Publish the quarantine, then the commit; compare with a commit that was faster."""
        if outcome.rejections:
            self.context.output.put(layout.quarantine(shard.name), quarantine_to_bytes(outcome.rejections))
        commit = Commit(
            fingerprint=self.context.fingerprint,
            shard=shard.name,
            input_size=shard.size,
            input_etag=shard.etag,
            output_size=writer.size,
            output_sha256=writer.sha256,
            protection_sha256=self.protection_sha256,
            num_protected=outcome.num_protected,
            num_quarantined=len(outcome.rejections),
            num_members=writer.num_members,
            input_image_bytes=outcome.input_image_bytes,
            output_image_bytes=outcome.output_image_bytes,
            max_abs_delta=outcome.max_abs_delta,
            quarantine=outcome.quarantine,
            clusters={str(cluster): count for cluster, count in sorted(outcome.clusters.items())},
            seconds=seconds,
        )
        if self.context.output.create(layout.commit(shard.name), commit.to_bytes()):
            return commit
        existing = self._committed(shard)
        if existing is not None:
            check_same_commit(commit, existing)
            self.metrics.record(CONFLICTS, 1, stage="apply", outcome="equal")
        return commit

    def _committed(self, shard: Shard) -> Commit | None:
        return Commit.read(self.context.output, layout.commit(shard.name))

    def _clusters(self, shard: Shard) -> dict[str, int]:
        """The cluster of every embedded sample of the shard, by key."""
        assignment = assignment_from_parquet(self.context.output.read(layout.assignment(shard.name)))
        return dict(zip(assignment.keys, assignment.clusters.tolist(), strict=True))

    def _done(self, shard: Shard, commit: Commit, started: float) -> ShardDone:
        seconds, ended = time.perf_counter() - started, time.time()
        work = Work(worker_name(), ended - seconds, ended, commit.seconds)
        return ShardDone(shard.name, commit.num_protected, commit.num_quarantined, shard.size, seconds, work)


@contextlib.contextmanager
def scratch_for(shard: Shard) -> Iterator[Path]:
    """A folder for the growing output. Raises StoreError, which says where, if there is no room for it."""
    try:
        with tempfile.TemporaryDirectory(prefix="scumble-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"cannot write {shard.name} to scratch space {tempfile.gettempdir()}: {error.strerror}; make room for one "
            "shard per worker, or set TMPDIR to another disk, then run the same command again"
        ) from None
