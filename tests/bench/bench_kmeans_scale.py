"""K-means of a million features on assigner actors against faiss.Kmeans:  python tests/bench/bench_kmeans_scale.py

1,000,000 x 512 features (float16 on disk, float32 at work), 1,000 clusters, 5 iterations, as in the stage `cluster` in
the space `features`: `AssignerPool` reads Parquet shards, `lloyd` sends it centroids. Both take all points, start from
the same 1,000 of them and make the same passes. Loading and the start of Ray are timed apart. Each way runs in a
process of its own, one after the other; ours with two actors of one thread each, faiss with two threads.

Inertia is that of the last pass of either, that is of the centroids after the update before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # of faiss.Kmeans; assigners have one each
    os.environ["RAY_AUTH_MODE"] = "disabled"

import faiss
import numpy as np
import ray
from bench_kmeans import Folder, points_of
from bench_uploads import peak_mb
from numpy.typing import NDArray
from ratio import where, write

from actors.assigner import SLICES, AssignerPool
from pipeline.clusters.kmeans import lloyd
from pipeline.hashing import numpy_rng
from pipeline.records import Features
from pipeline.surrogates.features import features_from_parquet, features_to_parquet

NEEDED_INERTIA = 0.001
OBJECT_STORE = 1_000_000_000  # as a private cluster of a job has


def shard_names(shards: int) -> list[str]:
    return [f"{number:04d}.parquet" for number in range(shards)]


def write_points(folder: Path, rows: int, dimension: int, shards: int) -> None:
    """Feature files, as `embed` leaves them."""
    for number, name in enumerate(shard_names(shards)):
        values = points_of(number, rows // shards, dimension)
        keys = tuple(f"{number:04d}/{row:06d}" for row in range(len(values)))
        file = features_to_parquet(Features(name, keys, values), surrogate_id="bench", fingerprint="bench")
        (folder / name).write_bytes(file)


def start_of(folder: Path, given: argparse.Namespace) -> NDArray[np.float32]:
    """The same rows of all shards for both: so many of the first of them that there are enough."""
    needed = -(-given.clusters * given.shards // given.rows) + 1
    names = shard_names(given.shards)[:needed]
    rows = np.concatenate([features_from_parquet((folder / name).read_bytes()).values for name in names])
    chosen = numpy_rng(0, "bench start").choice(len(rows), given.clusters, replace=False)
    return rows[chosen].astype(np.float32)


def ours(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    start = start_of(folder, given)
    ray.init(
        address="local",
        num_cpus=given.workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        logging_level="ERROR",
        log_to_driver=False,
    )
    began = time.perf_counter()
    pool = AssignerPool(Folder(folder), shard_names(given.shards), workers=given.workers, seed=0)
    assert pool.count() == given.rows
    loaded = time.perf_counter()
    before = time.process_time()
    result = lloyd(pool, start, max_iterations=given.iterations - 1, tolerance=0)
    spent = time.perf_counter() - loaded
    driver_cpu = time.process_time() - before
    actors = ray.get([held.__ray_call__.remote(lambda self: peak_mb()) for held in pool._actors])
    pool.close()
    ray.shutdown()
    assert result.iterations == given.iterations
    found = {"seconds": spent, "load_s": loaded - began, "inertia": result.inertia, "reseeded": result.reseeded}
    return found | {"driver_cpu_s": driver_cpu, "driver_peak_mb": peak_mb(), "actor_peak_mb": actors}


def theirs(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    start = start_of(folder, given)
    began = time.perf_counter()
    points = np.empty((given.rows, given.dimension), np.float32)
    step = given.rows // given.shards
    for number, name in enumerate(shard_names(given.shards)):
        points[number * step : (number + 1) * step] = features_from_parquet((folder / name).read_bytes()).values
    loaded = time.perf_counter()
    kmeans = faiss.Kmeans(
        given.dimension,
        given.clusters,
        niter=given.iterations,
        max_points_per_centroid=given.rows,
        min_points_per_centroid=1,
    )
    kmeans.train(points, init_centroids=start)
    assert kmeans.obj is not None
    spent = time.perf_counter() - loaded
    found = {"seconds": spent, "load_s": loaded - began, "inertia": float(kmeans.obj[-1])}
    return found | {"passes": len(kmeans.obj), "peak_mb": peak_mb()}


def in_a_process(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", what, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(given: argparse.Namespace, our: dict[str, Any], their: dict[str, Any], apart: float) -> None:
    size = f"{given.rows:,} x {given.dimension}, k {given.clusters:,}, {given.iterations} iterations"
    flops = 2 * given.rows * given.clusters * given.dimension * given.iterations
    traffic = SLICES * given.clusters * given.dimension * 8 / 1e6
    speed = flops / our["seconds"] / 1e9
    print(f"  {size}: ours {our['seconds']:.1f} s ({speed:.1f} GFLOP/s; loading {our['load_s']:.1f} s)")
    print(f"  faiss.Kmeans {their['seconds']:.1f} s (loading {their['load_s']:.1f} s)")
    print(
        f"  seconds ours / faiss {our['seconds'] / their['seconds']:.2f}, inertia differs by {apart:.5%}, needed 0.1 %"
    )
    actors = ", ".join(f"{one:,.0f}" for one in our["actor_peak_mb"])
    print(f"  peak MB: actors {actors}; driver {our['driver_peak_mb']:,.0f}; faiss {their['peak_mb']:,.0f}")
    print(f"  driver {our['driver_cpu_s']:.1f} CPU s; sums to the driver {traffic:,.0f} MB an iteration")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=200, help="a divisor of --rows")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("ours", "faiss"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows % given.shards:
        parser.error("--shards must divide --rows")
    if given.child:
        print(json.dumps((ours if given.child == "ours" else theirs)(Path(given.folder), given)))
        return 0
    origin = where()
    print(f"k-means: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    folder = Path(tempfile.mkdtemp(prefix="bench-kmeans-"))
    try:
        write_points(folder, given.rows, given.dimension, given.shards)
        our, their = in_a_process("ours", folder), in_a_process("faiss", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    apart = abs(our["inertia"] / their["inertia"] - 1)
    show(given, our, their, apart)
    names = ("rows", "dimension", "clusters", "iterations", "workers", "shards")
    sizes = {name: getattr(given, name) for name in names}
    ratio = our["seconds"] / their["seconds"]
    write("kmeans_scale", sizes | {"ours": our, "faiss": their, "ratio": ratio, "inertia_apart": apart})
    return 0 if apart <= NEEDED_INERTIA else 1


if __name__ == "__main__":
    sys.exit(main())
