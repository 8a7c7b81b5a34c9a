"""Shards through a pool on a real cluster: answers, failures, workers that are slow, workers that are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.cluster.stream import SHARE, block_sizes

POOLS = """
import json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import ray
from ray.exceptions import ActorUnavailableError
import actors.cluster.stream
import actors.cluster.attendance
import actors.uploader
from actors.cluster.attendance import signing
from actors.cluster.batches import ShardDone, done_columns, done_of, shard_rows, shards_of
from actors.cluster.connect import Workers, connected
from actors.cluster.failures import Failure
from actors.cluster.stream import collected, over_shards
from actors.cluster.tasks import over_tasks
from actors.uploader import over_units
from pipeline.errors import ScumbleError, StoreError
from pipeline.records import Shard

class Worker:
    def __init__(self, folder):
        if folder is None:
            raise StoreError("no weights")
        self.folder = folder

    def __call__(self, batch):
        (shard,) = shards_of(batch)
        tries = self.folder / shard.name
        with tries.open("a") as file:
            file.write("x")
        if shard.name.startswith("slow"):
            time.sleep(9)
        if shard.name.startswith("gone") and len(tries.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # alive for Ray, and nobody will ever hear of it
        if shard.name == "denied":
            raise StoreError("cannot create: no right to")
        if shard.name == "bug":
            raise KeyError("x")
        return done_columns([ShardDone(shard.name, 1, 0, shard.size, 0.0)])

class Uploads:
    def __init__(self, folder, device, threads, book):
        self.folder, self.book = folder, book

    def protect(self, unit):
        if unit == "silent":
            time.sleep(1000)
        try:
            with signing(self.book, unit, 1.0):
                (row,) = shard_rows([Shard(unit, 1, "")])
                return Worker(self.folder)({name: [value] for name, value in row.items()})["name"][0]
        except StoreError as error:
            return Failure.of(error, unit)

def units(names):
    try:
        return sorted(map(str, over_units(iter(names), Path(sys.argv[1]), Workers(1, 0.25, 0.0))))
    except ScumbleError as error:
        return [type(error).__name__, str(error)]

def run(ask, names, folder=Path(sys.argv[1])):
    try:
        said = ask([Shard(name, 1, "") for name in names], Worker, (folder,), Workers(1, 1.0, 0.0))
        return sorted(said)
    except ScumbleError as error:
        return [type(error).__name__, str(error)]

def answers(*arguments):
    return [done.name for done in over_shards(*arguments)]

def tables(*arguments):
    return [name for table in ray.get(collected(*arguments)) for name in table["name"].to_pylist()]

def unreachable_once(shards, *arguments):
    left, fails = {shard.name: shard for shard in shards}, [True]

    def answers(dataset):
        if fails and fails.pop():
            raise ActorUnavailableError("RPC error: connection refused", None)
        for batch in dataset.iter_batches(batch_size=None):
            yield from (left.pop(done.name).name for done in done_of(batch))

    return actors.cluster.stream._until_answered(left, *arguments, answers)

def task(folder, name):
    tries = folder / name
    with tries.open("a") as file:
        file.write("x")
    if name.startswith("slow"):
        time.sleep(9)
    if name.startswith("gone") and len(tries.read_text()) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "denied":
        raise StoreError("cannot create: no right to")
    return name.upper()

def tasks(names, folder=Path(sys.argv[1])):
    try:
        found = over_tasks(task, [(folder, name) for name in names], cpus=1)
        return {number: ray.get(value) for number, value in found}
    except ScumbleError as error:
        return [type(error).__name__, str(error)]

for module in (actors.cluster.attendance, actors.uploader):
    module.PATIENCE_SECONDS = 6.0
actors.uploader.Uploader = Uploads
with connected(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)):
    said = {"none": run(answers, [])}
    for name in ("denied", "bug"):
        said[name] = run(answers, [name])
    said["init"] = run(answers, ["a"], None)
    said["collected"] = run(tables, ["c", "d"])
    said["unreachable"] = run(unreachable_once, ["e", "f"])
    said["collected denied"] = run(tables, ["denied"])
    actors.cluster.stream.SHARE, share = 2, actors.cluster.stream.SHARE
    said["blocks"] = run(answers, [f"many-{number:02d}" for number in range(20)])
    actors.cluster.stream.SHARE = share
    said["units denied"] = units(["denied"])
    said["streamed"] = run(answers, ["a", "slow", "b", "gone"])  # last, as a stopped process keeps its CPU for a while
    said["tasks"] = tasks(["t", "slow-task", "gone-task"])
    said["tasks denied"] = tasks(["denied"])
    said["units"] = units(["u", "v", "gone-unit", "w"])
    actors.uploader.PATIENCE_SECONDS = 2.0
    said["units silent"] = units(["silent"])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What all of POOLS said, the folder in which each shard's tries are counted, and stderr."""
    folder = tmp_path_factory.mktemp("tries")
    done = subprocess.run(
        [sys.executable, "-c", POOLS, str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder, done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_slow_worker_is_left_alone_and_a_lost_answer_is_asked_for_again(pools: Any) -> None:
    said, folder, stderr = pools
    assert said["streamed"] == ["a", "b", "gone", "slow"]
    tries = {name: len((folder / name).read_text()) for name in ("a", "b", "slow", "gone")}
    assert tries == {"a": 1, "b": 1, "slow": 1, "gone": 2}  # slow takes longer than the patience
    assert "warning: no worker has given a sign of life for 6 s; submitting the 1 remaining shards again\n" in stderr
    assert said["collected"] == ["c", "d"]
    assert said["unreachable"] == ["e", "f"]
    assert "warning: a worker could not be reached; submitting the 2 remaining shards again\n" in stderr
    assert said["none"] == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_slow_task_is_left_alone_and_a_lost_one_runs_again(pools: Any) -> None:
    said, folder, stderr = pools
    assert said["tasks"] == {"0": "T", "1": "SLOW-TASK", "2": "GONE-TASK"}
    assert [len((folder / name).read_text()) for name in ("t", "slow-task", "gone-task")] == [1, 1, 2]
    assert "submitting the 1 remaining tasks again\n" in stderr
    assert said["tasks denied"] == ["StoreError", "cannot create: no right to"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_failure_inside_of_an_actor_is_one_line_of_its_own_kind_that_names_the_shard(pools: Any) -> None:
    said, _, stderr = pools
    assert said["denied"] == said["collected denied"] == ["StoreError", "denied: cannot create: no right to"]
    bug = "a worker failed: bug: KeyError: 'x'; run the same command again, or add --debug"
    assert said["bug"] == ["ClusterError", bug]
    assert said["init"] == ["StoreError", "no weights"]
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.ray
def test_blocks_of_several_shards_answer_for_each(pools: Any) -> None:
    said, _, _ = pools
    assert said["blocks"] == [f"many-{number:02d}" for number in range(20)]


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_unit_of_uploads_is_asked_for_again_and_a_silent_cluster_ends_the_run(pools: Any) -> None:
    said, folder, _ = pools
    assert said["units"] == ["gone-unit", "u", "v", "w"]
    assert len((folder / "gone-unit").read_text()) == 2
    assert len((folder / "u").read_text()) == 1
    assert said["units denied"] == ["StoreError", "denied: cannot create: no right to"]
    advice = "check what is using the CPUs of the cluster; the next run continues"
    assert said["units silent"] == [
        "ClusterError",
        f"no worker has given a sign of life for 2 s, 3 times in a row: {advice}",
    ]


@pytest.mark.parametrize("count", [0, 1, SHARE, 10_000, 1_000_000])
def test_a_million_shards_are_few_blocks_that_end_singly(count: int) -> None:
    sizes = block_sizes(count)
    assert sum(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 30_000
    assert set(sizes[-SHARE:]) <= {1}


@pytest.mark.parametrize("name", ["sampler", "assigner", "fit_queue", "cluster.attendance"])
def test_actors_that_need_no_network_start_without_torch(name: str) -> None:
    command = f"import sys, actors.{name}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
