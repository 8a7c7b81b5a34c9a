"""The transaction of one shard, in six steps; killed at any point and run again, it gives the same output.

1 done if a commit exists        4 write the output to local scratch, hashing it
2 open the planned version       5 put output and quarantine, create the commit
3 protect sample by sample       6 only with a commit does the output count
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipeline import layout
from pipeline.deltas.apply import ShardOutcome
from pipeline.errors import ConflictError, StoreError
from pipeline.records import Commit, Rejection, Sample, Shard, quarantine_to_bytes
from pipeline.shards.samples import FilesOutput, SampleWriter, TarOutput, output_for, samples_of
from pipeline.shards.scratch import scratch_for
from pipeline.storage.store import Store

ProtectSamples = Callable[[Iterator[Sample | Rejection], SampleWriter], ShardOutcome]


@dataclass(frozen=True)
class ShardTransaction:
    """Protects the shards of one run, from source to output.

    fingerprint        of the run
    protection_sha256  digest of the protection's file
    max_member_bytes   larger members are rejected
    encode             of the run; decides the names of loose images
    """

    source: Store
    output: Store
    fingerprint: str
    protection_sha256: str
    max_member_bytes: int
    encode: str = "same"

    def committed(self, shard: Shard) -> Commit | None:
        """Step 1: the commit of a shard, or None if it is not done."""
        return Commit.read(self.output, layout.commit(shard.name))

    def run(self, shard: Shard, protect: ProtectSamples) -> tuple[Commit, bool]:
        """Steps 2 to 6: the commit, and whether another worker had committed the same bytes first.

        protect  protects and writes, or rejects, every sample
        Raises InputError (changed-input) if the shard is not the version that was planned, ConflictError if another
        run has committed different bytes, StoreError if there is no room in scratch.
        """
        with scratch_for(shard) as scratch:
            with output_for(shard, scratch, self.encode) as writer:
                samples = samples_of(self.source, shard, max_member_bytes=self.max_member_bytes)
                outcome = protect(samples, writer)
            put_started = time.perf_counter()
            if (existing := self.committed(shard)) is not None:  # and must not be overwritten by other bytes
                commit = self._commit(shard, writer, outcome, dict(outcome.seconds))
                check_same_commit(commit, existing)
                return commit, True
            writer.publish(self.output)
            seconds = dict(outcome.seconds) | {"put": time.perf_counter() - put_started}
        if outcome.rejections:
            names = {image.key: image.files[0].name for image in shard.images}  # as they are in the folder
            told = [replace(one, member=names.get(one.key, one.member)) for one in outcome.rejections]
            self.output.put(layout.quarantine(shard.name), quarantine_to_bytes(told))
        commit = self._commit(shard, writer, outcome, seconds)
        if self.output.create(layout.commit(shard.name), commit.to_bytes()):
            return commit, False
        existing = self.committed(shard)
        if existing is None:
            where = f"{self.output.url}/{layout.commit(shard.name)}"
            raise StoreError(f"{where} was refused as existing, and is not there: run the same command again")
        check_same_commit(commit, existing)
        return commit, True

    def _commit(
        self, shard: Shard, writer: TarOutput | FilesOutput, outcome: ShardOutcome, seconds: dict[str, float]
    ) -> Commit:
        return Commit(
            fingerprint=self.fingerprint,
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
            images=tuple(writer.images),
            num_finer=outcome.num_finer,
            num_reread=outcome.num_reread,
            survival=outcome.survival,
        )


def check_same_commit(ours: Commit, theirs: Commit) -> None:
    """Raise ConflictError if another run committed different bytes for the shard we have just written."""
    if not ours.agrees_with(theirs):
        raise ConflictError(
            f"{ours.shard}: committed with SHA-256 {theirs.output_sha256[:16]} (input {theirs.input_etag}), "
            f"but produced here with {ours.output_sha256[:16]} (input {ours.input_etag}): two runs disagree; "
            "run jobs/verify.py and compare the workers' library versions and processors"
        )
