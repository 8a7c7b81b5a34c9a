"""The check-up of a Ray cluster: versions, disk space and GPUs of every node, reported by a task on it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.connect import WorkerRequest, connected, workers_for
from pipeline.errors import ClusterError
from pipeline.hashing import library_versions
from pipeline.runs.checkup import LEAST_SCRATCH_BYTES, LEAST_SHM_BYTES, SHM, Finding, compare_versions

ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class NodeFacts:
    """What a node reports: free bytes, and the GPUs that torch sees there."""

    versions: Mapping[str, str]
    scratch_bytes: int
    shm_bytes: int | None
    gpus: int


def facts() -> NodeFacts:
    """Ray task: the facts of the node that it runs on."""
    import torch

    versions = library_versions() | {"ray": ray.__version__, "python": platform.python_version()}
    shm = shutil.disk_usage(SHM).free if SHM.is_dir() else None
    scratch = shutil.disk_usage(Path(tempfile.gettempdir())).free
    return NodeFacts(versions, scratch, shm, torch.cuda.device_count())


def check_cluster(asked: WorkerRequest) -> list[Finding]:
    """Check the cluster at RAY_ADDRESS, node by node; without one, say that a private one would be started.

    Raises ClusterError if it does not answer, or runs a different version of Ray or Python.
    """
    if "RAY_ADDRESS" not in os.environ:
        detail = f"{ray.__version__}; RAY_ADDRESS is not set, so a run starts a private cluster"
        return [Finding("ok", "ray", detail)]
    with connected(asked):
        return _check_nodes(asked)


def _check_nodes(asked: WorkerRequest) -> list[Finding]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    findings = [Finding("ok", "cluster", f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs")]
    try:
        workers_for(asked)
    except ClusterError as error:
        advice = "add such nodes" + (", or leave --gpus-per-worker at 0" if asked.gpus_per_worker else "")
        findings.append(Finding("error", "cluster", str(error), advice))
    waiting = {str(node["NodeManagerAddress"]): _ask(node) for node in nodes}
    ours = facts().versions
    for address, reference in waiting.items():
        findings += _check_node(address, reference, ours)
    return findings


def _ask(node: Mapping[str, Any]) -> Any:
    """A reference to the facts of a node; only tasks that request a GPU see one."""
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    gpus = 0.01 if node["Resources"].get("GPU") else 0
    return ray.remote(facts).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote()


def _check_node(address: str, reference: Any, ours: Mapping[str, str]) -> list[Finding]:
    try:
        told: NodeFacts = ray.get(reference, timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        detail = f"no answer within {ANSWER_SECONDS:.0f} s"
        return [Finding("warning", address, detail, "check what is using its GPUs, and its log for errors")]
    except RayError as error:
        line = str(error).strip().splitlines()[-1][:200]
        return [Finding("error", address, f"a task failed there: {line}", "is Scumble installed on this node?")]
    findings = compare_versions(ours, told.versions, address)
    if told.scratch_bytes < LEAST_SCRATCH_BYTES:
        detail = f"{told.scratch_bytes / 1e9:.1f} GB of scratch space left"
        findings.append(Finding("warning", address, detail, "shards are written there first, and Ray spills to it"))
    if told.shm_bytes is not None and told.shm_bytes < LEAST_SHM_BYTES // 4:  # most of it is Ray's by now
        detail = f"{told.shm_bytes / 1e9:.1f} GB of /dev/shm left"
        findings.append(Finding("warning", address, detail, "give its container more shared memory"))
    if told.gpus:
        findings.append(Finding("ok", address, f"torch sees {told.gpus} GPU"))
    return findings
