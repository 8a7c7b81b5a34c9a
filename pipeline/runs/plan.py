"""What a run will do: its listing minus its commits; touches no storage, tar or Ray."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConflictError, InputError, unreadable
from pipeline.records import Plan, Shard, images_from_json, images_to_json


def make_plan(shards: Iterable[Shard], fingerprint: str, committed: Iterable[str]) -> Plan:
    """The plan for a listing, given the names of shards that have a commit.

    Raises InputError for an empty listing, ConflictError for a commit whose shard is not in the input.
    """
    rows = tuple(sorted(shards, key=lambda shard: shard.name))
    if not rows:
        raise InputError("the input contains no shards and no images")
    plan = Plan(rows, fingerprint, frozenset(committed))
    if len(plan.left) + len(plan.done) != len(
        rows
    ):  # count: building sets of 10^6 names would cost more than everything else here
        stranger = min(plan.done.difference(shard.name for shard in rows))
        raise ConflictError(f"the output has a commit for {stranger}, which is not in the input")
    return plan


def plan_to_parquet(plan: Plan) -> bytes:
    """The listing a run was planned from as Parquet, one row per shard or unit."""
    table = pa.table(
        {
            "name": [shard.name for shard in plan.shards],
            "size": pa.array([shard.size for shard in plan.shards], pa.int64()),
            "etag": [shard.etag for shard in plan.shards],
            "images": [images_to_json(shard.images) for shard in plan.shards],
        },
        metadata={"fingerprint": plan.fingerprint},
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def planned_shards(data: bytes, where: str) -> list[Shard]:
    """The shards and units of loose images in a plan. Raises InputError for anything but a plan."""
    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        return [Shard(row["name"], row["size"], row["etag"], images_from_json(row.get("images", "[]"))) for row in rows]
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise unreadable(where, error) from None


def planned_units(data: bytes, where: str) -> dict[str, Shard]:
    """The units of loose images in a plan, by name. Raises InputError for anything but a plan."""
    return {shard.name: shard for shard in planned_shards(data, where) if shard.images}
