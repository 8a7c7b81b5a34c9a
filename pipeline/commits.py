"""Decisions over what is planned and what is committed: no storage, no tar, no Ray in here.

plan = listing - commits. What decides output bytes goes into one fingerprint; a run record that bears another one
is a conflict, and so is a commit with other digests.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConflictError, InputError
from pipeline.fingerprint import FORMAT_VERSION, canonical, library_versions, sha256
from pipeline.records import Commit, Plan, Shard
from pipeline.settings import Settings


@dataclass(frozen=True)
class Ingredients:
    """Everything that decides output bytes: two runs with equal ingredients write equal shards."""

    settings: Mapping[str, Any]
    listing_sha256: str
    weights_sha256: str  # of the surrogate
    protection_sha256: str | None  # of a protection that is applied instead of fitted
    key_sha256: str | None  # of the secret of --generator texture
    device: str  # class of device: "cpu" or "cuda"
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return sha256(canonical([FORMAT_VERSION, vars(self)]))


def ingredients_of(
    settings: Settings,
    shards: Iterable[Shard],
    *,
    weights_sha256: str,
    protection_sha256: str | None = None,
    key_sha256: str | None = None,
) -> Ingredients:
    """Gather what decides the bytes of a run over `shards` with `settings`."""
    listing = [[shard.name, shard.size, shard.etag] for shard in shards]
    return Ingredients(
        settings=settings.deciding,
        listing_sha256=sha256(canonical(listing)),
        weights_sha256=weights_sha256,
        protection_sha256=protection_sha256,
        key_sha256=key_sha256,
        device="cuda" if settings.gpus_per_worker else "cpu",
        versions=library_versions(),
    )


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


def run_record(ingredients: Ingredients, settings: Settings, plan: Plan) -> dict[str, Any]:
    """What run.json holds; it has no secret: credentials and keys are not in the settings."""
    return {
        "fingerprint": ingredients.fingerprint,
        "ingredients": vars(ingredients) | {"settings": dict(ingredients.settings)},
        "input": settings.input,
        "num_shards": len(plan.shards),
        "input_bytes": plan.total_bytes,
    }


def check_same_run(existing: Mapping[str, Any], wanted: Mapping[str, Any], output: str) -> None:
    """Raise ConflictError, naming what differs, if an output belongs to a run with another fingerprint."""
    if existing["fingerprint"] == wanted["fingerprint"]:
        return
    differences = list(_differences("", existing["ingredients"], wanted["ingredients"]))
    shown = "; ".join(differences[:6]) or "format version"
    raise ConflictError(
        f"{output} belongs to another run ({shown}): use its settings to resume it, another --output, or --overwrite"
    )


def _differences(prefix: str, old: Any, new: Any) -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(f"{prefix}.{name}" if prefix else name, old.get(name), new.get(name))
    elif old != new:
        name = prefix.removeprefix("settings.")
        yield f"{name} was {_shortened(old)}, is {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


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


def plan_from_parquet(data: bytes, committed: Iterable[str]) -> Plan:
    """The plan of a run that was started before."""
    table = pq.read_table(io.BytesIO(data))
    fingerprint = (table.schema.metadata or {})[b"fingerprint"].decode()
    shards = [Shard(row["name"], row["size"], row["etag"]) for row in table.to_pylist()]
    return make_plan(shards, fingerprint, committed)
