"""Clusters that grow and shrink while a stage runs: raylets of this machine, one worker each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.util import get_node_ip_address as node_ip_address

from tests.faults.kills import Family
from tests.faults.nodes import RAY
from tests.support import runs
from tests.support.samples import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

WORKER = """
import json, os, sys, time
os.environ["RAY_AUTH_MODE"] = "disabled"
from types import SimpleNamespace
import ray
from actors.cluster.batches import ShardDone, done_columns, shards_of
from actors.cluster.connect import connected, workers_for
from actors.cluster.stream import over_shards
from pipeline.records import Shard

class Worker:
    def __call__(self, batch):
        (shard,) = shards_of(batch)
        time.sleep(1)
        place = int(ray.get_runtime_context().get_node_id()[-12:], 16)
        return done_columns([ShardDone(shard.name, place, 0, shard.size, 0.0)])

def answers(count, workers):
    asked = SimpleNamespace(workers=workers, gpus_per_worker=0.0, debug=False)
    with connected(asked):
        yield from over_shards([Shard(f"{n:03d}", 1, "") for n in range(count)], Worker, (), workers_for(asked))
"""
JOINS = """
from ray.cluster_utils import Cluster
few = {"num_cpus": 1, "object_store_memory": 80_000_000}
head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1]}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(**few)
os.environ["RAY_ADDRESS"] = cluster.address
places, joined, left = [], None, None
for done in answers(60, None):
    places.append(done.images)
    if joined is None:
        joined = cluster.add_node(**few)
    if left is None and len(set(places[-4:])) == 2:
        left = len(places)
        cluster.remove_node(joined, allow_graceful=False)
print(json.dumps({"answers": len(places), "nodes": len(set(places)), "left": left}))
cluster.shutdown()
"""
SCALES = """
places = [[done.images for done in answers(count, workers)] for count, workers in ((40, 3), (40, None))]
print(json.dumps([[len(each), len(set(each))] for each in places]))
"""
HEAD = 51 * "f" + 5 * "0"  # the name that the provider gives it
_LISTS = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
_MORE_LISTS = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")


def autoscaling(folder: Path, port: int) -> dict[str, Any]:
    """Settings of an autoscaler that starts raylets of this machine, one to three, each with one CPU."""
    small = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    return {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": small | {"min_workers": 1, "max_workers": 3},
        },
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{node_ip_address()}:{port}",
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
        **{name: [] for name in (*_LISTS, *_MORE_LISTS, "rsync_exclude", "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
    }


@pytest.fixture
def autoscaled() -> Iterator[str]:
    """Address of a head whose autoscaler is on."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(json.dumps(autoscaling(folder, port)))
        options = ["--num-cpus=0", "--object-store-memory=100000000", "--include-dashboard=false", "--block"]
        places = [f"--port={port}", f"--temp-dir={folder}", f"--autoscaling-config={folder}/config.yaml"]
        mine = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        mine |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
        mine |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        with (folder / "log").open("wb") as log:
            head = subprocess.Popen(
                [RAY, "start", "--head", *options, *places], env=os.environ | mine, stdout=log, stderr=log
            )
        family = Family(head)
        try:
            runs.wait_for(lambda: "will now block forever" in (folder / "log").read_text(), head, 60)
            yield f"{node_ip_address()}:{port}"
        finally:
            family.look()
            family.bury()


NEVER = """
from pipeline.errors import ClusterError
asked = SimpleNamespace(workers=2, gpus_per_worker=1.0, debug=False)
with connected(asked):
    started = time.monotonic()
    try:
        list(over_shards([Shard("a", 1, "")], Worker, (), workers_for(asked)))
    except ClusterError as error:
        print(json.dumps([str(error), time.monotonic() - started]))
"""


def said(program: str, address: str = "") -> Any:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", WORKER + program, folder],
            capture_output=True,
            text=True,
            timeout=350,
            check=False,
            env=os.environ | {"PYTHONPATH": str(runs.ROOT)} | ({"RAY_ADDRESS": address} if address else {}),
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stage_uses_a_node_that_joins_and_goes_on_without_it() -> None:
    found = said(JOINS)
    assert found["answers"] == 60
    assert found["nodes"] == 2
    assert found["left"] < 60


def test_an_autoscaler_is_asked_for_the_workers_of_the_run_and_not_for_what_it_never_adds(autoscaled: str) -> None:
    assert said(SCALES, autoscaled) == [[40, 3], [40, 3]]
    refusal, seconds = said(NEVER, autoscaled)
    assert refusal.startswith("no node of the Ray cluster has 1 GPU and a CPU (--gpus-per-worker 1) for a worker; its ")
    assert refusal.endswith("; its autoscaler has none to add")
    assert seconds < 60
