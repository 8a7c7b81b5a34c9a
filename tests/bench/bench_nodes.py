"""Two nodes against one, in the stage `apply`:  python tests/bench/bench_nodes.py [--shards 40] [--order 1 2 2 1 1 2]

A Ray cluster of a head without CPUs and one or two nodes of one CPU each on this machine; the stage itself
(`jobs.stages.apply`) joins it through RAY_ADDRESS. Before it, the actor alone, without Ray, in one process and in two:
what the machine can give. Photographs of 500x375, 1,000 to a shard, as large collections have them; the few tar files
that are made stand there under many names (hard links). Input and output lie in --folder, by default in memory
(/dev/shm): the nodes share one disk here, which real ones do not. Torch and BLAS have one thread in every process.

Each of the three raylets looks through all processes of the machine, which on real nodes are its own few: Ray's memory
monitor is therefore off, and its metrics are collected once a minute. All else is as Ray has it.

A run in which the host gave more than 2 % of the two cores to other machines (the kernel counts that as stolen) is
printed, not counted, and done again, twice at most: it says what they had, not what two nodes give. Whether a run
counts does not depend on its rate.

rate   images a second by the modification times of the commits on disk, from the first commit of each node (400 images
       at least), as the start of the actors is not in it, to the last before a node runs out of shards
head   CPU seconds of the driver, the head's raylet and the control store while the stage runs, by image and by shard;
       and where the actors of the stage live
alone  rate of two processes without Ray against one; what a cluster falls short of that is Ray's and ours
cores  CPU seconds of the actors by second of the same time, of `nodes` that there could be
stolen share of all cores that the host gave to others in that time
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"] = "disabled", "0"
    os.environ.update(RAY_memory_monitor_refresh_ms="0", RAY_metrics_report_interval_ms="60000")

import numpy as np
import ray
from bench_apply import CLUSTERS, protection, samples_of
from photo_shards import write_shards
from ratio import where, write
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from actors.batches import RunContext, shard_rows
from actors.connect import connected
from actors.protector import Protector
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
WIDTH, HEIGHT, PER_SHARD, DISTINCT = 500, 375, 1000, 6
SKIPPED = 400  # images to a node, rounded up to whole commits
OBJECT_STORE = 200_000_000
STOLEN, TRIES = 0.02, 3


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
    """Notes on which nodes actors of `apply` live, and the CPU seconds that they have had, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nodes: set[str] = set()
        self.spent: list[tuple[float, float]] = []  # time, CPU seconds of all actors
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(2.0):
            pids = []
            for actor in ray._private.state.actors().values():
                if "Protector" in f"{actor.get('ActorClassName')} {actor.get('Name')}" and actor["State"] == "ALIVE":
                    self.nodes.add(actor["Address"]["NodeID"])
                    pids.append(actor["Pid"])
            with contextlib.suppress(OSError):  # it may just have ended
                self.spent.append((time.time(), sum(map(cpu_seconds, pids))))

    def cores(self, first: float, last: float) -> float:
        """CPU seconds of the actors by second between two times; nan where they lie too near to each other."""
        within = [one for one in self.spent if first <= one[0] <= last]
        if len(within) < 2:
            return math.nan
        (start, before), (end, after) = within[0], within[-1]
        return (after - before) / (end - start)


class Stolen(threading.Thread):
    """Notes the CPU seconds that the host has withheld from this machine, once a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.noted: list[tuple[float, float]] = []
        self.over = threading.Event()

    def __enter__(self) -> Stolen:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(1.0):
            ticks = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
            self.noted.append((time.time(), ticks / os.sysconf("SC_CLK_TCK")))

    def share(self, first: float, last: float) -> float:
        """Of all cores, between two times."""
        within = [one for one in self.noted if first <= one[0] <= last]
        (start, before), (end, after) = within[0], within[-1]
        return (after - before) / (end - start) / (os.cpu_count() or 1)


def undisturbed(measure: Callable[[Path, int], dict[str, Any]], folder: Path, nodes: int) -> list[dict[str, Any]]:
    """Measures until nobody took the cores, or three times; the last is the one that counts, if any does."""
    tries: list[dict[str, Any]] = []
    while len(tries) < TRIES and not (tries and tries[-1]["counts"]):
        with Stolen() as stolen:
            found = measure(folder, nodes)
        found["stolen"] = stolen.share(found["from"], found["to"])
        found["counts"] = found["stolen"] <= STOLEN
        said = "" if found["counts"] else ", not counted"
        print(f"    {found['stolen']:.1%} of the cores stolen{said}", flush=True)
        tries.append(found)
    return tries


def head_pids(cluster: Cluster) -> dict[str, int]:
    """What runs on the head beside the driver, by its name in Ray."""
    held = cluster.head_node.all_processes
    return {name: infos[0].process.pid for name, infos in held.items() if name in ("raylet", "gcs_server")}


def part_alone(folder: Path, output: Path, part: int, parts: int) -> None:
    """The actor over its part of the shards, without Ray; to be called in a process of its own."""
    run = run_of(folder, output)
    protector = Protector(RunContext(run.source, run.output, run.settings, "bench", threads=1, device="cpu"))
    for row in shard_rows(run.plan.shards)[part::parts]:
        protector({field: [value] for field, value in row.items()})


def alone(folder: Path, processes: int) -> dict[str, Any]:
    """Rate of so many processes that run the actor without Ray."""
    output = folder / f"alone-{processes}"
    shutil.copytree(folder / "before", output)
    command = [sys.executable, __file__, "--folder", str(folder), "--alone", str(output)]
    running = [subprocess.Popen([*command, str(part), str(processes)]) for part in range(processes)]
    failed = [process.args for process in running if process.wait()]
    assert not failed, failed
    found = rate_of(output, processes)
    shutil.rmtree(output)
    print(f"  {processes} process(es) without Ray: {found['rate']:7.1f} images/s", flush=True)
    return {"nodes": processes, **found}


def one_cluster(folder: Path, nodes: int) -> dict[str, Any]:
    """The stage on a cluster of so many nodes; to be called in a process of its own."""
    output = folder / f"out-{nodes}-{os.getpid()}"
    shutil.copytree(folder / "before", output)
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: paths of sockets end at 107 bytes
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # `Cluster` writes its address there all the same
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
    cores = watch.cores(found["from"], found["to"])
    return {"nodes": nodes, **found, "cores": cores, "head_cpu_s": head, "actors_on_head": len(watch.nodes - workers)}


def rate_of(output: Path, nodes: int) -> dict[str, Any]:
    """Images a second between commits, as the disk tells their times."""
    paths = sorted((output / layout.COMMITS).rglob("*.json"), key=lambda path: path.stat().st_mtime)
    images = [json.loads(path.read_text())["num_protected"] for path in paths]
    times = [path.stat().st_mtime for path in paths]
    last = len(times) - nodes  # after it a node may have nothing left to do
    first = min(math.ceil(SKIPPED / images[0]) * nodes - 1, last - 1)
    seconds = times[last] - times[first]
    rate = sum(images[first + 1 : last + 1]) / seconds
    return {
        "images": sum(images),
        "shards": len(paths),
        "from": times[first],
        "to": times[last],
        "seconds": seconds,
        "rate": rate,
    }


def in_a_process(folder: Path, nodes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(nodes), "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    head = sum(found["head_cpu_s"].values())
    per_image, per_shard = 1e6 * head / found["images"], 1e3 * head / found["shards"]
    print(
        f"  {nodes} node(s): {found['rate']:.1f} images/s over {found['seconds']:.0f} s on {found['cores']:.2f} cores; "
        f"head {per_image:.0f} us CPU per image, {per_shard:.1f} ms per shard, {found['actors_on_head']} actors",
        flush=True,
    )
    return found


def two_to_one(runs: list[dict[str, Any]]) -> float:
    """Mean rate with two over mean rate with one, of the runs that count; nan where none of either does."""
    rates = {count: [one["rate"] for one in runs if one["nodes"] == count and one["counts"]] for count in (1, 2)}
    return statistics.mean(rates[2]) / statistics.mean(rates[1]) if rates[1] and rates[2] else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--per-shard", type=int, default=PER_SHARD)
    parser.add_argument("--order", type=int, nargs="+", default=[1, 2, 2, 1, 1, 2], help="nodes of each run in turn")
    parser.add_argument("--folder", help="where shards are written (default: /dev/shm, if it is there)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        part_alone(Path(given.folder), Path(given.alone[0]), *map(int, given.alone[1:]))
        return 0
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
        runs, alone_runs = [], []
        for nodes in given.order:  # in turns: a machine that others use too has fast and slow minutes
            alone_runs += undisturbed(alone, folder, nodes)
            runs += undisturbed(in_a_process, folder, nodes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratio, ratio_alone = two_to_one(runs), two_to_one(alone_runs)
    shortest = min(one["seconds"] for one in runs)
    print(f"  two nodes against one: {ratio:.2f}, needed {NEEDED_RATIO}; shortest run {shortest:.0f} s")
    print(f"  two processes without Ray: {ratio_alone:.2f}; the cluster keeps {ratio / ratio_alone:.0%} of that")
    print("  cores that the actors of two nodes had:", *(f"{one['cores']:.2f}" for one in runs if one["nodes"] == 2))
    if shortest < NEEDED_S:
        print(f"  runs of less than {NEEDED_S:.0f} s prove nothing: take more --shards")
    write(
        "nodes", {"runs": runs, "ratio": ratio, "needed": NEEDED_RATIO, "alone": alone_runs, "ratio_alone": ratio_alone}
    )
    return 0 if ratio >= NEEDED_RATIO and shortest >= NEEDED_S else 1


if __name__ == "__main__":
    sys.exit(main())
