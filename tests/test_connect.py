"""Clusters that a job starts or joins: what a process may ask for, and what is said if there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.connect import connected
from pipeline.errors import InputError

ASKED = SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)
TWO_NODES = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "disabled"
from types import SimpleNamespace
import ray
from ray.cluster_utils import Cluster
from actors.connect import connected, cpus_of_a_node, workers_for
few = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=few | {"include_dashboard": False, "temp_dir": sys.argv[1]})
cluster.add_node(**few)
os.environ["RAY_ADDRESS"] = cluster.address
asked = SimpleNamespace(workers=1, gpus_per_worker=0.0, debug=False)
with connected(asked):
    one, all_of_them = workers_for(asked), workers_for(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False))
    print(cpus_of_a_node(), one.count, one.cpus, all_of_them.count, all_of_them.cpus)
cluster.shutdown()
"""


@pytest.mark.ray
def test_ray_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)  # the names of its sockets would be too long
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with (
        pytest.raises(InputError, match=r"^Ray did not start on this machine \(.*107 bytes.*\); .* a short path"),
        connected(ASKED),
    ):
        pass
    assert list(deep.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_no_process_asks_for_more_cpus_than_one_node_has() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", TWO_NODES, folder],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
    assert done.stdout.split() == ["1.0", "1", "1.0", "2", "1.0"], done.stderr
