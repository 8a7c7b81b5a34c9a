"""All metrics in one table, with name, unit, labels and meaning; and how stages report them.

Labels have few values: a stage, a step, a reason, never the name of a shard or image. Everything is reported once per
shard (or unit of uploads), so that the cost of reporting is negligible. A counter called `x` here is exported as
`x_total`; Ray prefixes all names with `ray_`, which the PodMonitor in k8s/ removes again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.errors import ConflictError, PromiseError

STAGES = ("load", "embed", "label", "cluster", "fit", "apply", "measure", "relearn", "uploads")
STEPS = ("read", "decode", "copy", "resize", "model", "delta", "add", "encode", "put")
STATES = ("done", "skipped", "failed")


@dataclass(frozen=True)
class Metric:
    """One metric; reporting adds to a counter, sets a gauge, or adds an observation to a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name used in queries."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


_SHARD_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

IMAGES = Metric("scumble_images", "counter", "images", ("stage",), "images finished by a stage")
BYTES = Metric("scumble_bytes", "counter", "bytes", ("stage", "direction"), "shard bytes read (in) and written (out)")
SHARDS = Metric(
    "scumble_shards", "counter", "shards", ("stage", "state"), "shards done, skipped (already committed), or failed"
)
QUARANTINED = Metric(
    "scumble_quarantined_images", "counter", "images", ("stage", "reason"), "images refused, by reason code"
)
STAGE_SECONDS = Metric(
    "scumble_stage_seconds", "counter", "seconds", ("stage", "step"), "seconds of work, summed over processes"
)
SHARD_SECONDS = Metric(
    "scumble_shard_seconds", "histogram", "seconds", ("stage",), "wall seconds of one shard", _SHARD_SECONDS
)
QUEUE_DEPTH = Metric("scumble_queue_depth", "gauge", "shards", ("stage",), "units of a stage still to be done")
LAST_PROGRESS = Metric(
    "scumble_last_progress_timestamp_seconds", "gauge", "seconds since 1970", (), "when a unit was last finished"
)
RESTARTED = Metric("scumble_actor_restarts", "counter", "restarts", ("stage",), "processes that died and were replaced")
CONFLICTS = Metric(
    "scumble_commit_conflicts",
    "counter",
    "commits",
    ("stage", "outcome"),
    "commits already made by another run: with equal bytes (harmless) or different ones (an error)",
)
VIOLATIONS = Metric(
    "scumble_budget_violations",
    "counter",
    "shards",
    ("stage",),
    "shards stopped because the epsilon bound or another guarantee did not hold; must stay 0",
)
DRIFTED = Metric(
    "scumble_drifted_images",
    "counter",
    "images",
    ("stage",),
    "images farther from their cluster than 99 % of the fitted ones; 1 % is expected",
)
ASSIGNED = Metric(
    "scumble_assigned_images", "counter", "images", ("stage",), "images compared with a fitted protection"
)
LAST_SUCCESS = Metric(
    "scumble_last_success_timestamp_seconds", "gauge", "seconds since 1970", ("command",), "when a job last succeeded"
)
LEASE_HELD = Metric(
    "scumble_lease_held", "gauge", "0 or 1", ("command",), "1 if a run did nothing because another one held the lease"
)
RELEARNED = Metric(
    "scumble_relearned_accuracy",
    "gauge",
    "share in [0, 1]",
    ("protection", "regime"),
    "accuracy on clean test images after training on protected ones: best target, mean over seeds",
)

METRICS = (
    *(IMAGES, BYTES, SHARDS, QUARANTINED, STAGE_SECONDS, SHARD_SECONDS, QUEUE_DEPTH, LAST_PROGRESS, RESTARTED),
    *(CONFLICTS, VIOLATIONS, DRIFTED, ASSIGNED, LAST_SUCCESS, LEASE_HELD, RELEARNED),
)


class Recorder(Protocol):
    """An exporter of metrics."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe in a histogram. Counters ignore values that are not positive."""


class Silent:
    """A Recorder that discards everything."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class ShardCounts:
    """What is reported for one shard, or for one unit of uploads.

    quarantine  reason code -> images
    seconds     step -> seconds of work; steps not in STEPS are ignored
    elapsed     wall seconds
    assigned    images compared with a fitted protection
    drifted     those of them that are unlike anything fitted
    """

    images: int
    quarantine: Mapping[str, int]
    bytes_in: int
    bytes_out: int
    seconds: Mapping[str, float]
    elapsed: float
    assigned: int = 0
    drifted: int = 0


def report_shard(recorder: Recorder, stage: str, counts: ShardCounts) -> None:
    """Report a finished shard."""
    record = recorder.record
    record(SHARDS, 1, stage=stage, state="done")
    record(IMAGES, counts.images, stage=stage)
    record(BYTES, counts.bytes_in, stage=stage, direction="in")
    record(BYTES, counts.bytes_out, stage=stage, direction="out")
    for reason, count in counts.quarantine.items():
        record(QUARANTINED, count, stage=stage, reason=reason)
    for step in STEPS:
        record(STAGE_SECONDS, counts.seconds.get(step, 0.0), stage=stage, step=step)
    record(SHARD_SECONDS, counts.elapsed, stage=stage)
    record(ASSIGNED, counts.assigned, stage=stage)
    record(DRIFTED, counts.drifted, stage=stage)


def report_failure(recorder: Recorder, stage: str, error: BaseException) -> None:
    """Report a failed shard; the kind of failure decides what else is counted."""
    recorder.record(SHARDS, 1, stage=stage, state="failed")
    if isinstance(error, PromiseError):
        recorder.record(VIOLATIONS, 1, stage=stage)
    if isinstance(error, ConflictError):
        recorder.record(CONFLICTS, 1, stage=stage, outcome="different")


def report_progress(recorder: Recorder, stage: str, left: int) -> None:
    """Report that a unit of a stage is done and `left` remain."""
    recorder.record(QUEUE_DEPTH, left, stage=stage)
    recorder.record(LAST_PROGRESS, time.time())


def report_success(recorder: Recorder, command: str) -> None:
    """Report that a job succeeded."""
    recorder.record(LAST_SUCCESS, time.time(), command=command)
