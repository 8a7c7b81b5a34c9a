"""Two nodes against one, in the stage `apply`:  python tests/bench/bench_nodes.py [--shards 240] [--order 1 2 2 1]

A Ray cluster of a head without CPUs and one or two nodes of one CPU each on this machine; the stage itself
(`jobs.stages.apply`) joins it through RAY_ADDRESS. Photographs of 500x375, 100 to a shard; the few tar files that are
made stand there under many names (hard links). Input and output lie in --folder, by default in memory (/dev/shm): the
nodes share one disk here, which real ones do not. Torch and BLAS have one thread in every process.

rate   images a second by the modification times of the commits on disk, without the first four to a node: the start of
       the actors is not in it
head   CPU seconds of the driver, the head's raylet and the control store while the stage runs, by image and by shard;
       and where the actors of the stage live
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"] = "disabled", "0"

import numpy as np
import ray
from bench_apply import CLUSTERS, protection, samples_of
from photo_shards import write_shards
from ratio import where, write
from ray.cluster_utils import Cluster

from actors.connect import connected
from jobs.prepare import Run
from jobs.stages import apply
from pipeline import layout
from pipeline.commits import make_plan
from pipeline.features import Assignment, assignment_to_parquet
from pipeline.records import Shard
from pipeline.settings import Settings
from pipeline.store import Store

NEEDED_RATIO = 1.8
NEEDED_S = 30.0  # that the measured part of a run should last, or the ends of it weigh too much
WIDTH, HEIGHT, PER_SHARD, DISTINCT = 500, 375, 100, 6
SKIPPED = 4  # commits to a node
OBJECT_STORE = 200_000_000


def prepare(folder: Path, shards: int, per_shard: int) -> None:
    """Input shards, and an output as the stages before `apply` leave it, which every run copies."""
    made = write_shards(folder / "made", shards=DISTINCT, per_shard=per_shard, width=WIDTH, height=HEIGHT)
    (folder / "in").mkdir()
    output = Store(str(folder / "before"))
    output.put(layout.PROTECTION, protection().to_bytes())
    keys = [tuple(sample.key for sample in samples_of(path)) for path in made]
    clusters = np.arange(per_shard, dtype=np.int32) % CLUSTERS
    for number in range(shards):
        name = f"shard-{number:06d}.tar"
        os.link(made[number % DISTINCT], folder / "in" / name)
        known = Assignment(name, keys[number % DISTINCT], clusters, np.zeros(per_shard, np.float32))
        output.put(layout.assignment(name), assignment_to_parquet(known))


def run_of(folder: Path, output: Path) -> Run:
    """The run as `apply` is handed it; there is no surrogate, because it needs none."""
    source = Store(str(folder / "in"))
    shards = [Shard(entry.name, entry.size, entry.etag) for entry in source.list()]
    settings = Settings(input=source.url, output=str(output))
    plan = make_plan(shards, "bench", ())
    return Run(settings, source, Store(str(output)), plan, cast(Any, None), None, None, None, {})


def cpu_seconds(pid: int) -> float:
    """Of a process, all threads, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch(threading.Thread):
    """Notes on which nodes actors of `apply` live, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nodes: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(2.0):
            for actor in ray._private.state.actors().values():
                if "Protector" in f"{actor.get('ActorClassName')} {actor.get('Name')}" and actor["State"] == "ALIVE":
                    self.nodes.add(actor["Address"]["NodeID"])


def head_pids(cluster: Cluster) -> dict[str, int]:
    """What runs on the head beside the driver, by its name in Ray."""
    held = cluster.head_node.all_processes
    return {name: infos[0].process.pid for name, infos in held.items() if name in ("raylet", "gcs_server")}


def one_cluster(folder: Path, nodes: int) -> dict[str, Any]:
    """The stage on a cluster of so many nodes; to be called in a process of its own."""
    output = folder / f"out-{nodes}-{os.getpid()}"
    shutil.copytree(folder / "before", output)
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: paths of sockets end at 107 bytes
    about = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=about | {"temp_dir": temporary})
    try:
        workers = {cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE).node_id for _ in range(nodes)}
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        run = run_of(folder, output)
        pids = head_pids(cluster) | {"driver": os.getpid()}
        with connected(run.settings):
            watch = Watch()
            watch.start()
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            apply(run)
            head = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
            watch.over.set()
            watch.join()
        found = rate_of(output, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
    assert watch.nodes == workers, f"actors on {watch.nodes}, nodes with a CPU: {workers}"
    return {"nodes": nodes, **found, "head_cpu_s": head, "actors_on_head": len(watch.nodes - workers)}


def rate_of(output: Path, nodes: int) -> dict[str, Any]:
    """Images a second between commits, as the disk tells their times."""
    paths = sorted((output / layout.COMMITS).rglob("*.json"), key=lambda path: path.stat().st_mtime)
    images = [json.loads(path.read_text())["num_protected"] for path in paths]
    times = [path.stat().st_mtime for path in paths]
    first = min(SKIPPED * nodes, len(times) - 2)
    seconds = times[-1] - times[first]
    return {"images": sum(images), "shards": len(paths), "seconds": seconds, "rate": sum(images[first + 1 :]) / seconds}


def in_a_process(folder: Path, nodes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(nodes), "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    head = sum(found["head_cpu_s"].values())
    per_image, per_shard = 1e6 * head / found["images"], 1e3 * head / found["shards"]
    print(
        f"  {nodes} node(s): {found['rate']:7.1f} images/s over {found['seconds']:.1f} s, {found['images']:,} images; "
        f"head {per_image:.0f} us CPU per image, {per_shard:.1f} ms per shard, {found['actors_on_head']} actors",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=240)
    parser.add_argument("--per-shard", type=int, default=PER_SHARD)
    parser.add_argument("--order", type=int, nargs="+", default=[1, 2, 2, 1], help="nodes of each run in turn")
    parser.add_argument("--folder", help="where shards are written (default: /dev/shm, if it is there)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(one_cluster(Path(given.folder), given.child)))
        return 0
    origin = where()
    print(f"nodes: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="bench-nodes-", dir=given.folder or memory))
    started = time.perf_counter()
    try:
        prepare(folder, given.shards, given.per_shard)
        print(f"  {given.shards} shards made in {time.perf_counter() - started:.0f} s", flush=True)
        runs = [in_a_process(folder, nodes) for nodes in given.order]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rates = {nodes: statistics.mean(one["rate"] for one in runs if one["nodes"] == nodes) for nodes in (1, 2)}
    shortest = min(one["seconds"] for one in runs)
    print(f"  two nodes against one: {rates[2] / rates[1]:.2f}, needed {NEEDED_RATIO}; shortest run {shortest:.0f} s")
    if shortest < NEEDED_S:
        print(f"  runs of less than {NEEDED_S:.0f} s prove nothing: take more --shards")
    write("nodes", {"runs": runs, "ratio": rates[2] / rates[1], "needed": NEEDED_RATIO})
    return 0 if rates[2] / rates[1] >= NEEDED_RATIO and shortest >= NEEDED_S else 1


if __name__ == "__main__":
    sys.exit(main())
