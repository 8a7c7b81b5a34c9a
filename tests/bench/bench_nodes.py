"""Two nodes against one, in the stage `apply`:  python tests/bench/bench_nodes.py [--cores 1 0.85] [--turns 2]

A Ray cluster of a head without CPUs and two nodes of one CPU each on this machine; the stage itself
(`jobs.protection.stages.apply`) joins it through RAY_ADDRESS. While it runs, one of its two actors is stopped
(SIGSTOP) for ten seconds, then both work for ten, then the other is stopped, and so on: what one node does and what
two do is measured within the same half minute, because other guests of the host make this machine faster or slower by
a tenth and more from one minute to the next, which is more than is to be told apart. What else lives on a node, its
raylet and its agents, is not stopped.

Two kinds of nodes (--cores):

1      kept to one actor by Ray, and to nothing by the machine: while one actor works, the head and Ray's services have
       the second core to themselves; while two work, they have none
0.85   a node, with its raylet, its agents and its actor, has 0.85 of a core from the kernel, as a pod has its
       `limits.cpu`, and the head what is left: as on a real cluster, the head does not live off a node. Needs root and
       control groups of version 1

Before each turn the actor without Ray, in two processes, in the same manner: what the machine can give.

Photographs of 500x375, 250 to a shard; the few tar files that are made stand there under many names (hard links). Input
and output lie in --folder, by default in memory (/dev/shm): the nodes share one disk here, which real ones do not.
Torch and BLAS have one thread in every process. Each of the three raylets looks through all processes of the machine,
which on real nodes are its own few: Ray's memory monitor is therefore off, and its metrics are collected once a minute.
All else is as Ray has it. Ten seconds in which the host gave more than 2 % of the cores to other machines (the kernel
counts that as stolen) are left out, whatever was done in them.

rate    images a second, by the modification times of the commits on disk; ratio with the standard error of its pairs of
        neighbouring windows
cores   CPU seconds of the actors, a second
head    CPU seconds of the driver, the head's raylet and the control store, a second; and how many actors live there
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"] = "disabled", "0"
    os.environ.update(RAY_memory_monitor_refresh_ms="0", RAY_metrics_report_interval_ms="60000")

import numpy as np
import ray
from bench_apply import CLUSTERS, protection, samples_of
from cores import Quota, Turns
from photo_shards import write_shards
from ratio import where, write
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from actors.cluster.batches import RunContext, shard_rows
from actors.cluster.connect import connected
from actors.protector import Protector
from jobs.protection.prepare import Run
from jobs.protection.stages import apply
from pipeline import layout
from pipeline.records import Shard
from pipeline.runs.plan import make_plan
from pipeline.settings import Settings
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet

NEEDED_RATIO = 1.8
NEEDED_WINDOWS = 10  # of one actor, and of two
STOLEN = 0.02
WIDTH, HEIGHT, PER_SHARD, DISTINCT = 500, 375, 250, 6
FIRST, LAST = 12, 50  # shards before the first window, and left when the last begins: a window takes some 30
OBJECT_STORE = 200_000_000


def prepare(folder: Path, shards: int) -> None:
    """Input shards, and an output as the stages before `apply` leave it, which every run copies."""
    made = write_shards(folder / "made", shards=DISTINCT, per_shard=PER_SHARD, width=WIDTH, height=HEIGHT)
    (folder / "in").mkdir()
    output = Store(str(folder / "before"))
    output.put(layout.PROTECTION, protection().to_bytes())
    keys = [tuple(sample.key for sample in samples_of(path)) for path in made]
    clusters = np.arange(PER_SHARD, dtype=np.int32) % CLUSTERS
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        os.link(made[number % DISTINCT], folder / "in" / name)
        known = Assignment(name, keys[number % DISTINCT], clusters, np.zeros(PER_SHARD, np.float32))
        output.put(layout.assignment(name), assignment_to_parquet(known))


def run_of(folder: Path, output: Path) -> Run:
    """The run as `apply` is handed it; there is no surrogate, because it needs none."""
    source = Store(str(folder / "in"))
    shards = [Shard(entry.name, entry.size, entry.etag) for entry in source.list()]
    settings = Settings(input=source.url, output=str(output))
    plan = make_plan(shards, "bench", ())
    return Run(settings, source, Store(str(output)), plan, cast(Any, None), None, None, cast(Any, None))


def commits_of(output: Path) -> list[tuple[float, int]]:
    """Time and images of every commit so far; what is committed is taken away, so that memory holds the rest."""
    found = []
    for path in (output / layout.COMMITS).rglob("*.json"):
        commit = json.loads(path.read_text())
        found.append((path.stat().st_mtime, commit["num_protected"]))
        (output / commit["shard"]).unlink(missing_ok=True)
    return found


def protectors() -> dict[int, str]:
    """Process of every actor of `apply` that lives, and the node that it lives on."""
    return {
        actor["Pid"]: actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if "Protector" in f"{actor.get('ActorClassName')} {actor.get('Name')}" and actor["State"] == "ALIVE"
    }


def part_alone(folder: Path, output: Path, part: int) -> None:
    """The actor over every second shard, without Ray; to be called in a process of its own."""
    run = run_of(folder, output)
    protector = Protector(RunContext(run.source, run.output, run.settings, "bench", threads=1, device="cpu"))
    for row in shard_rows(run.plan.shards)[part::2]:
        protector({field: [value] for field, value in row.items()})


def alone(folder: Path, shards: int) -> dict[str, Any]:
    """Two processes that run the actor without Ray, in turns."""
    output = folder / "alone"
    shutil.copytree(folder / "before", output)
    command = [sys.executable, __file__, "--folder", str(folder), "--alone", str(output)]
    running = [subprocess.Popen([*command, str(part)]) for part in range(2)]
    pids = [process.pid for process in running]
    with Turns(lambda: pids, lambda: commits_of(output), (FIRST, shards - LAST)) as turns:
        failed = [process.args for process in running if process.wait()]
    shutil.rmtree(output)
    assert not failed, failed
    return {"cores": None, "windows": turns.counted(), "actors_on_head": 0}


def on_cluster(folder: Path, shards: int, cores: float) -> dict[str, Any]:
    """The stage on a cluster of two nodes of so many cores, in turns; to be called in a process of its own."""
    output = folder / "out"
    shutil.copytree(folder / "before", output)
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: paths of sockets end at 107 bytes
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # `Cluster` writes its address there all the same
    about = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=about | {"temp_dir": temporary})
    with contextlib.ExitStack() as left:
        left.callback(shutil.rmtree, output, ignore_errors=True)
        left.callback(shutil.rmtree, temporary, ignore_errors=True)
        quotas = [left.enter_context(Quota(cores)) for _ in range(2)] if cores < 1 else []
        left.callback(cluster.shutdown)
        left.callback(ray.shutdown)
        nodes = []
        for number in range(2):
            with quotas[number].starting() if quotas else contextlib.nullcontext():
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE).node_id)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        run = run_of(folder, output)
        held = cluster.head_node.all_processes
        head = [os.getpid(), *(held[name][0].process.pid for name in ("raylet", "gcs_server"))]
        places: dict[int, str] = {}

        def workers() -> list[int]:
            places.update(protectors())
            return list(places)

        with (
            connected(run.settings),
            Turns(workers, lambda: commits_of(output), (FIRST, shards - LAST), head) as turns,
        ):
            apply(run)
    assert sorted(places.values()) == sorted(nodes), f"actors on {places}, nodes with a CPU: {nodes}"
    on_head = sum(node not in nodes for node in places.values())
    return {"cores": cores, "windows": turns.counted(), "actors_on_head": on_head}


def in_a_process(folder: Path, shards: int, cores: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--shards", str(shards), "--folder", str(folder), "--child", str(cores)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of one and of two actors over all windows that count, and what they and the head had of the cores."""
    windows = [[one for one in run["windows"] if one["stolen"] <= STOLEN] for run in runs]
    found: dict[str, Any] = {"left_out": sum(len(run["windows"]) for run in runs) - sum(map(len, windows))}
    for count, name in ((1, "one"), (2, "two")):
        those = [one for run in windows for one in run if one["working"] == count]
        seconds = sum(one["end"] - one["start"] for one in those)
        rate, cores, head = (sum(one[what] for one in those) / seconds for what in ("images", "actors_s", "head_s"))
        found[name] = {"windows": len(those), "rate": rate, "cores": cores, "head": head}
    pairs = [
        rate_of(after) / rate_of(before) if after["working"] == 2 else rate_of(before) / rate_of(after)
        for run in windows
        for before, after in itertools.pairwise(run)
        if before["working"] != after["working"]
    ]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs) / 2) if len(pairs) > 1 else math.nan  # each is in two pairs
    return found | {"ratio": found["two"]["rate"] / found["one"]["rate"], "error": error}


def rate_of(window: dict[str, float]) -> float:
    return window["images"] / (window["end"] - window["start"])


def show(name: str, found: dict[str, Any]) -> None:
    one, two = found["one"], found["two"]
    print(
        f"  {name}: one {one['rate']:.0f} images/s on {one['cores']:.2f} cores, head {one['head']:.3f}; two "
        f"{two['rate']:.0f} on {two['cores']:.2f}, head {two['head']:.3f}; {found['ratio']:.2f} "
        f"+- {found['error']:.2f} ({one['windows']} and {two['windows']} windows, {found['left_out']} left out)",
        flush=True,
    )


def conclude(runs: list[dict[str, Any]]) -> bool:
    """Prints and writes what the runs say; whether all that is needed was reached."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        kinds.setdefault("without Ray" if run["cores"] is None else f"nodes of {run['cores']:g}", []).append(run)
    found = {name: summary(those) for name, those in kinds.items()}
    print(f"  all, two against one, needed {NEEDED_RATIO}:")
    for name, each in found.items():
        show(name, each)
    write("nodes", {"needed": NEEDED_RATIO, "found": found, "runs": runs})
    enough = all(each[name]["windows"] >= NEEDED_WINDOWS for each in found.values() for name in ("one", "two"))
    return enough and all(each["ratio"] >= NEEDED_RATIO for each in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cores", type=float, nargs="+", default=[1.0, 0.85], help="that a node has; 1: no limit")
    parser.add_argument("--folder", help="where shards are written (default: /dev/shm, if it is there)")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        part_alone(Path(given.folder), Path(given.alone[0]), int(given.alone[1]))
        return 0
    if given.child:
        print(json.dumps(on_cluster(Path(given.folder), given.shards, given.child)))
        return 0
    origin = where()
    print(f"nodes: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="bench-nodes-", dir=given.folder or memory))
    try:
        prepare(folder, given.shards)
        runs = []
        for _ in range(given.turns):
            for cores in (None, *given.cores):
                run = alone(folder, given.shards) if cores is None else in_a_process(folder, given.shards, cores)
                show("without Ray" if cores is None else f"nodes of {cores:g}", summary([run]))
                runs.append(run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if conclude(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
