"""What Ray adds to a plain loop:  python tests/bench/bench_ray.py [--rounds N]

10,000 JPEGs of 160x160 in 20 shards, from a local folder to commits, deltas of clusters. Plain: the actor
`Protector` is called for one shard after the other in this process, one thread. Ours: the same through one actor of
the stage's own pool. Both in turns. Wall seconds from the beginning of the first shard to the end of the last one are
compared; what the start of the pool takes is shown beside.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_apply import CASES, Bench
from ratio import Spread, where, write

from actors.cluster.batches import Secret
from actors.cluster.connect import Workers, connected
from actors.cluster.stream import over_shards
from actors.protector import Protector
from pipeline import layout
from pipeline.settings import Settings

CASE = replace(CASES[0], shards=20)
NEEDED = 0.05


def plain(bench: Bench) -> float:
    """Seconds of the loop."""
    started = time.perf_counter()
    for number in range(len(bench.shards)):
        bench.ours(number)
    return time.perf_counter() - started


def through_ray(bench: Bench) -> tuple[float, float]:
    """Seconds from the first shard's beginning to the last one's end, and seconds before that."""
    started = time.time()
    arguments = (bench.protector.context, Secret(None))
    work = [done.work for done in over_shards(bench.shards, Protector, arguments, Workers(1, 1.0, 0.0))]
    began = min(each.began for each in work)
    return max(each.ended for each in work) - began, began - started


def emptied(bench: Bench) -> None:
    for shard in bench.shards:
        bench.output.delete([layout.commit(shard.name), shard.name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-ray-"))
    rows = []
    try:
        bench = Bench(folder, CASE)
        with connected(Settings(workers=1)):
            for number in range(rounds + 1):
                found = {}
                for way in ("plain", "ray") if number % 2 else ("ray", "plain"):
                    emptied(bench)
                    if way == "plain":
                        found["plain_s"] = plain(bench)
                    else:
                        found["ray_s"], found["start_s"] = through_ray(bench)
                if number:  # the first is a warm-up
                    rows.append(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    overhead = Spread.of([row["ray_s"] / row["plain_s"] - 1 for row in rows])
    start = statistics.median(row["start_s"] for row in rows)
    images = CASE.shards * CASE.per_shard
    print(
        f"{images:,} images of {CASE.width}x{CASE.height} in {CASE.shards} shards: Ray adds {overhead} of the loop, "
        f"at most {NEEDED} wanted, and {start:.1f} s to start the pool; load {where()['load']}"
    )
    write("ray", {"overhead": vars(overhead), "needed": NEEDED, "start_s": start, "rows": rows})


if __name__ == "__main__":
    main()
