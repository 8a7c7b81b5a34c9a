"""Metrics inside Ray: the agent of a node exports what its processes report, with `ray_` before every name."""

from __future__ import annotations

import os
import sys
from typing import Any

from pipeline.metrics import RESTARTED, Metric, Recorder, Silent

_MADE: dict[str, Any] = {}  # of this process: a second object of one name would be a second series


class RayRecorder:
    """Reports through ray.util.metrics; only inside a cluster."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """As pipeline.metrics.Recorder says."""
        made = _MADE.get(metric.name) or _MADE.setdefault(metric.name, _make(metric))
        if metric.kind == "gauge":
            made.set(value, tags=labels)
        elif metric.kind == "histogram":
            made.observe(value, tags=labels)
        elif value > 0:
            made.inc(value, tags=labels)


def _make(metric: Metric) -> Any:
    from ray.util import metrics

    about = {"description": f"{metric.help} [{metric.unit}]", "tag_keys": metric.labels}
    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, boundaries=list(metric.buckets), **about)
    return (metrics.Gauge if metric.kind == "gauge" else metrics.Counter)(metric.name, **about)


def recorder() -> Recorder:
    """Where this process reports: to the cluster that it is in, else nowhere. Never imports Ray."""
    ray = sys.modules.get("ray")
    return RayRecorder() if ray is not None and ray.is_initialized() else Silent()


def actor_recorder(stage: str) -> Recorder:
    """The recorder of an actor that is being built; counts a restart if the actor replaces a dead one."""
    counting = recorder()
    if isinstance(counting, RayRecorder):
        import ray

        context = ray.get_runtime_context()
        if context.get_actor_id() and context.was_current_actor_reconstructed:
            counting.record(RESTARTED, 1, stage=stage)
    return counting


def worker_name() -> str:
    """The id of this actor; outside Ray that of the process."""
    ray = sys.modules.get("ray")
    actor = ray.get_runtime_context().get_actor_id() if ray is not None and ray.is_initialized() else None
    return str(actor or os.getpid())
