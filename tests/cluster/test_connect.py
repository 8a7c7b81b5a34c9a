"""Clusters that a job starts or joins: what a process may ask for, and what is said if there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.cluster.connect import connected
from pipeline.errors import ClusterError
from tests.support.samples import free_port

ASKED = SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)
UNEQUAL_NODES = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "disabled"
from types import SimpleNamespace
import ray
from ray.cluster_utils import Cluster
from actors.cluster.connect import connected, workers_for, workers_now
from pipeline.errors import ClusterError
few = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=few | {"include_dashboard": False, "temp_dir": sys.argv[1]})
cluster.add_node(**few)
cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=80_000_000)
os.environ["RAY_ADDRESS"] = cluster.address

def asked(workers, gpus):
    return SimpleNamespace(workers=workers, gpus_per_worker=gpus, debug=False)

with connected(asked(1, 0.0)):
    for found in (workers_for(asked(1, 0.0)), workers_for(asked(None, 0.0)), workers_for(asked(None, 0.5)),
                  workers_now(asked(9, 0.0), most=2)):
        print(found.count, found.cpus, found.gpus)
    try:
        workers_for(asked(None, 2.0))
    except ClusterError as error:
        print(error)
cluster.shutdown()
"""


@pytest.mark.ray
def test_ray_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)  # the names of its sockets would be too long
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with (
        pytest.raises(ClusterError, match=r"^Ray did not start on this machine \(.*107 bytes.*\); .* a short path"),
        connected(ASKED),
    ):
        pass
    assert list(deep.iterdir()) == []


AFTER_ANOTHER = """
import os, signal, socket, sys, tempfile
from types import SimpleNamespace
import ray
from actors.cluster.connect import connected
from pipeline.errors import ClusterError
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a job does
asked = SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)
tempfile.tempdir = sys.argv[1]
try:
    with connected(asked): pass
except ClusterError:
    tempfile.tempdir = None

@ray.remote(num_cpus=0)
class Actor:
    def answer(self): return "answered"

def answer(): return ray.get(Actor.remote().answer.remote(), timeout=100)

for _ in range(2):
    with connected(asked):
        print(answer())
        node = ray._private.worker._global_node
        assert node.dashboard_agent_listen_port not in (0, 52365)
        socket.create_connection((node.node_ip_address, node.dashboard_agent_listen_port), 5).close()
assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
os.environ["RAY_AUTH_MODE"] = "disabled"
ray.init(address="local", include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
print(answer())
"""


@pytest.mark.ray
def test_clusters_follow_one_another_in_a_process_and_none_waits_for_the_port_of_another(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    command = [sys.executable, "-c", AFTER_ANOTHER, str(deep)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.stdout.splitlines() == ["answered"] * 3, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_no_process_asks_for_more_than_a_node_has_that_can_take_it() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", UNEQUAL_NODES, folder],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert done.stdout.splitlines() == [
        "1 2.0 0.0",
        "4 1.0 0.0",
        "2 1.0 0.5",
        "2 1.0 0.0",
        "no node of the Ray cluster has 2 GPU and a CPU (--gpus-per-worker 2) for a worker; its nodes: "
        "2 with 1 CPU, 0 GPU; 1 with 2 CPU, 1 GPU",
    ], done.stderr


def joined(address: str, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """A program that tries to join a cluster; what it says, and whatever reaches its terminal."""
    program = (
        "from types import SimpleNamespace\n"
        "from actors.cluster.connect import connected\n"
        "from pipeline.errors import ClusterError\n"
        "try:\n"
        "    with connected(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)): pass\n"
        "except ClusterError as error:\n"
        "    print(error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_ADDRESS": address},
    )


@pytest.mark.ray
@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.org"])
def test_the_address_of_a_dashboard_is_refused_at_once_with_what_to_do(address: str) -> None:
    done = joined(address, seconds=60)
    assert done.stderr == ""
    assert done.stdout.startswith(
        f"RAY_ADDRESS={address} is the address of a dashboard: set it to HOST:PORT of the head"
    )


@pytest.mark.ray
@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:port"])  # auto finds the clusters of tests beside this one
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    done = joined(address, seconds=60)
    assert done.stderr == ""
    assert done.stdout.startswith("the Ray cluster at RAY_ADDRESS does not answer (")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_dead_cluster_is_given_up_within_a_minute_and_says_nothing_else() -> None:
    done = joined(f"127.0.0.1:{free_port()}", seconds=70)  # 60, and the start of Python on a busy machine
    assert done.stderr == ""
    assert done.stdout.startswith("the Ray cluster at RAY_ADDRESS does not answer (Failed to connect to Ray cluster at")
    assert done.stdout.endswith("; unset RAY_ADDRESS to run here\n")
