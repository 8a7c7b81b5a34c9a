"""Decisions over what is planned and what is committed: no storage, no tar, no Ray in here.

plan = listing - commits. A commit with other digests is a conflict.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConflictError, InputError
from pipeline.records import Commit, Plan, Shard


def make_plan(shards: Iterable[Shard], fingerprint: str, committed: Iterable[str]) -> Plan:
    """The plan over a listing, given the names of shards that have a commit.

    Raises InputError for an empty listing, ConflictError for a commit of a shard that the input does not have.
    """
    rows = tuple(sorted(shards, key=lambda shard: shard.name))
    if not rows:
        raise InputError("the input holds no shards")
    plan = Plan(rows, fingerprint, frozenset(committed))
    if len(plan.left) + len(plan.done) != len(rows):  # counted, as sets of 10^6 names cost more than all else here
        stranger = min(plan.done.difference(shard.name for shard in rows))
        raise ConflictError(f"the output has a commit for {stranger}, which the input does not have")
    return plan


def check_same_commit(ours: Commit, theirs: Commit) -> None:
    """Raise ConflictError if somebody committed other bytes for the shard that we have just written."""
    if not ours.agrees_with(theirs):
        raise ConflictError(
            f"{ours.shard}: committed with SHA-256 {theirs.output_sha256[:16]} (input {theirs.input_etag}), "
            f"but made here with {ours.output_sha256[:16]} (input {ours.input_etag}): two runs disagree; "
            "run jobs/verify.py and compare library versions of the workers"
        )


def plan_to_parquet(plan: Plan) -> bytes:
    """The listing that a run was planned from, one row per shard."""
    table = pa.table(
        {
            "name": [shard.name for shard in plan.shards],
            "size": pa.array([shard.size for shard in plan.shards], pa.int64()),
            "etag": [shard.etag for shard in plan.shards],
        },
        metadata={"fingerprint": plan.fingerprint},
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
