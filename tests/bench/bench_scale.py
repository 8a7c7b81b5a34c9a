"""What grows with the number of shards on the driver: plan, resume decision, start, status.

python tests/bench/bench_scale.py [--sizes 10000 100000 1000000] [--folder DIR]

plan    a listing that is given -> ingredients, fingerprint, plan, run record, the bytes of plan.parquet
resume  which shards are committed (half of them) and which are left, from an output that a killed run left behind
start   all that a resumed job does before Ray starts: it lists the input too (`jobs.protection.prepare.prepare`)
status  `jobs.inspection.status.status_of` when every shard is committed; reads every commit

Each row is a process of its own, and the median of five where one takes less than 5 s. In DIR (default: the folder for
temporary files) lie, for N shards, N commits of about 0.9 KB, each a file of its own; N names of input shards, 2N of
features and assignments and N of output shards, which are hard links to empty files: only their names are looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_uploads import peak_mb
from ratio import where, write

from jobs.inspection.status import status_of
from jobs.protection.prepare import committed_shards, prepare, start_run
from pipeline import layout
from pipeline.hashing import canonical, sha256
from pipeline.records import Commit, Shard
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.plan import make_plan, plan_to_parquet
from pipeline.runs.run_record import RunRecord, read_run
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.storage.store import Store

SIZES = (10_000, 100_000, 1_000_000)
NEEDED_S, NEEDED_MB, NEEDED_GROWTH = 60.0, 2000.0, 12.0
SHORT_S, ROUNDS = 5.0, 5
LINKS = 50_000  # to one file: ext4 allows 65,000
PER_SHARD, CLUSTERS, SHARD_BYTES = 1000, 15, 110_000_000
STEPS = ("add", "decode", "delta", "encode", "put", "read", "write")


def shard_name(number: int) -> str:
    """A thousand shards to a folder, as large collections are laid out."""
    return f"{number // 1000:04d}/shard-{number:07d}.tar"


def settings_of(folder: Path) -> Settings:
    return Settings(input=str(folder / "in"), output=str(folder / "out"), surrogate=EMBEDDED_SURROGATE)


def commit_of(number: int, fingerprint: str) -> Commit:
    """What `apply` leaves of a shard; every hundredth image-wise incomplete, so that there are reasons to count."""
    refused = {"undecodable": 2, "empty": 1} if number % 100 == 0 else {}
    protected = PER_SHARD - sum(refused.values())
    return Commit(
        fingerprint=fingerprint,
        shard=shard_name(number),
        input_size=SHARD_BYTES + number,
        input_etag=f"{SHARD_BYTES + number}-1700000000000000",
        output_size=SHARD_BYTES + 2 * number,
        output_sha256=sha256(shard_name(number).encode()),
        protection_sha256=fingerprint,
        num_protected=protected,
        num_quarantined=PER_SHARD - protected,
        num_members=2 * protected,
        input_image_bytes=SHARD_BYTES - 5_000_000,
        output_image_bytes=SHARD_BYTES - 4_000_000,
        max_abs_delta=16,
        quarantine=refused,
        clusters={str(cluster): protected // CLUSTERS for cluster in range(CLUSTERS)},
        seconds={step: 0.123456789 + number * 1e-7 for step in STEPS},
    )


def link_all(folder: Path, names: Iterator[str]) -> None:
    """Empty files of these names."""
    source = folder / "empty"
    for number, name in enumerate(names):
        if number % LINKS == 0:
            source = folder / f"empty-{number}-{os.getpid()}-{time.monotonic_ns()}"
            source.touch()
        path = folder / name
        try:
            os.link(source, path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True)
            os.link(source, path)


def make_inputs(folder: Path, size: int) -> dict[str, Any]:
    """Input, and all that a run has left before it comes to `apply`, the run record by the job's own code."""
    link_all(folder, (f"in/{shard_name(number)}" for number in range(size)))
    run = prepare(settings_of(folder))
    start_run(run)
    for place in (layout.features, layout.assignment):
        link_all(folder, (f"out/{place(shard_name(number))}" for number in range(size)))
    return {}


def make_commits(folder: Path, size: int, remainder: int) -> dict[str, Any]:
    """Output shards and commits of every second shard, counted from `remainder`."""
    fingerprint = json.loads((folder / "out" / layout.RUN).read_text())["fingerprint"]
    numbers = range(remainder, size, 2)
    link_all(folder, (f"out/{shard_name(number)}" for number in numbers))
    for number in numbers:
        path = folder / "out" / layout.commit(shard_name(number))
        if number % 1000 == remainder:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical(commit_of(number, fingerprint).to_json()))
    return {"bytes": path.stat().st_size}


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What work answers, and its seconds."""
    before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    found = work()
    spent = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return found, spent | {"peak_mb": peak_mb(), "peak_before_mb": before}


def measure_plan(folder: Path, size: int) -> dict[str, Any]:
    settings = settings_of(folder)
    listing = [Shard(shard_name(number), SHARD_BYTES + number, f"{number:032x}") for number in range(size)]

    def work() -> int:
        ingredients = ingredients_of(settings, listing, weights_sha256="0" * 64)
        plan = make_plan(listing, ingredients.fingerprint, ())
        assert RunRecord.of(ingredients, settings, plan).num_shards == size
        return len(plan_to_parquet(plan))

    written, spent = measured(work)
    return spent | {"plan_bytes": written}


def measure_resume(folder: Path, size: int) -> dict[str, Any]:
    settings = settings_of(folder)
    output = Store(settings.output)
    listing = [Shard(shard_name(number), 0, "") for number in range(size)]
    record = read_run(output)

    def work() -> tuple[int, int, str]:
        done = committed_shards(settings, output, record, {shard.name for shard in listing})
        plan = make_plan(listing, record.fingerprint, done)
        return len(plan.done), len(plan.left), plan.left[0].name

    found, spent = measured(work)
    assert found == (size // 2, size // 2, shard_name(1)), found
    return spent


def measure_start(folder: Path, size: int) -> dict[str, Any]:
    run, spent = measured(lambda: prepare(settings_of(folder)))
    assert (len(run.plan.shards), len(run.plan.done)) == (size, size // 2)
    return spent


def measure_status(folder: Path, size: int) -> dict[str, Any]:
    found, spent = measured(lambda: status_of(Store(settings_of(folder).output)))
    refused = -(-size // 100)
    assert found["shards"] == f"{size} of {size} committed"
    assert found["done"] is True
    assert found["images"] == size * PER_SHARD - 3 * refused
    assert found["reasons"] == {"empty": refused, "undecodable": 2 * refused}
    assert found["input_bytes"] == size * SHARD_BYTES + size * (size - 1) // 2
    assert found["output_bytes"] == size * SHARD_BYTES + size * (size - 1)
    return spent


CHILDREN: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "inputs": make_inputs,
    "plan": measure_plan,
    "first half": lambda folder, size: make_commits(folder, size, 0),
    "resume": measure_resume,
    "start": measure_start,
    "second half": lambda folder, size: make_commits(folder, size, 1),
    "status": measure_status,
}


def child(what: str, folder: Path, size: int) -> dict[str, Any]:
    """One of the above in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--sizes", str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def repeated(what: str, folder: Path, size: int) -> dict[str, Any]:
    """One of the above; the median of several where it is short, because such times vary much."""
    found = [child(what, folder, size)]
    while found[0].get("seconds", math.inf) < SHORT_S and len(found) < ROUNDS:
        found.append(child(what, folder, size))
    return sorted(found, key=lambda one: float(one.get("seconds", 0.0)))[len(found) // 2] | {"rounds": len(found)}


def measure(parent: str | None, size: int) -> list[dict[str, Any]]:
    """All rows of one size; the folder is taken away afterwards."""
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=parent))
    try:
        for what in CHILDREN:
            found = repeated(what, folder, size)
            if "seconds" in found:
                rows.append({"what": what, "shards": size} | found)
                print(
                    f"  {what:8} {size:>9,} shards {found['seconds']:8.2f} s  CPU {found['cpu_s']:8.2f} s  "
                    f"peak {found['peak_mb']:7,.0f} MB (before: {found['peak_before_mb']:,.0f})",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the largest size over those of a tenth of it, where both were measured."""
    seconds = {(one["what"], one["shards"]): one["seconds"] for one in rows}
    largest = max(one["shards"] for one in rows)
    return {
        what: spent / seconds[what, largest // 10]
        for (what, size), spent in seconds.items()
        if size == largest and (what, largest // 10) in seconds
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--folder", help="where the synthetic files are made")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(CHILDREN[given.child](Path(given.folder), given.sizes[0])))
        return 0
    origin = where()
    print(f"scale: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    needed = {"seconds": NEEDED_S, "peak_mb": NEEDED_MB, "growth": NEEDED_GROWTH}
    rows: list[dict[str, Any]] = []
    for size in sorted(given.sizes):  # written after each size: the last takes long
        rows += measure(given.folder, size)
        write("scale", {"rows": rows, "growth": growth(rows), "needed": needed})
    found = growth(rows)
    for what, ratio in found.items():
        print(f"  {what:8} ten times the shards take {ratio:5.2f} times the seconds, needed {NEEDED_GROWTH:g}")
    met = all(one["seconds"] < NEEDED_S and one["peak_mb"] < NEEDED_MB for one in rows)
    return 0 if met and all(ratio <= NEEDED_GROWTH for ratio in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
