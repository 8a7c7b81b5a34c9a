"""Peak memory of a worker, for a shard of 500 and of 5,000 images:  python tests/bench/bench_memory.py

Each figure is the largest resident size of a new process that holds one actor, as a Ray worker does, and sends one
shard through it: `Embedder` to its features, `Protector` to its commit. Images: 256x256 JPEGs.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_apply import CLUSTERS, protection, samples_of
from photo_shards import write_shards
from ratio import where, write

from actors.cluster.batches import RunContext, shard_rows
from actors.embedder import Embedder
from actors.protector import Protector
from pipeline import layout
from pipeline.records import Shard
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet

ALLOWED = 0.20
SIDE, DISTINCT, SMALL, LARGE = 256, 250, 500, 5_000
SURROGATE_SIDE = 160
_KIB = 1 if sys.platform == "darwin" else 1024


def peak(actor: str, folder: Path) -> int:
    """Bytes; to be called in a process of its own."""
    torch.set_num_threads(1)
    source, output = Store(str(folder / "in")), Store(str(folder / "out"))
    (entry,) = source.list()
    shard = Shard(entry.name, entry.size, entry.etag)
    settings = Settings(surrogate=EMBEDDED_SURROGATE, surrogate_size=SURROGATE_SIDE)
    context = RunContext(source, output, settings, "bench", threads=1, device="cpu")
    worker: Any = Embedder(context, None) if actor == "Embedder" else Protector(context)
    worker({field: [value] for field, value in shard_rows([shard])[0].items()})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def prepare(folder: Path, images: int) -> None:
    """One shard, its assignment, and a protection."""
    (path,) = write_shards(folder / "in", shards=1, per_shard=images, width=SIDE, height=SIDE, distinct=DISTINCT)
    output = Store(str(folder / "out"))
    output.put(layout.PROTECTION, protection().to_bytes())
    keys = tuple(sample.key for sample in samples_of(path))
    clusters = np.arange(len(keys), dtype=np.int32) % CLUSTERS
    assignment = Assignment(path.name, keys, clusters, np.zeros(len(keys), np.float32))
    output.put(layout.assignment(path.name), assignment_to_parquet(assignment))


def peaks(sizes: tuple[int, ...] = (SMALL, LARGE)) -> dict[str, dict[int, int]]:
    """Bytes, by actor and number of images in the shard."""
    folder = Path(tempfile.mkdtemp(prefix="bench-memory-"))
    spawn = multiprocessing.get_context("spawn")
    try:
        for images in sizes:
            prepare(folder / str(images), images)
        found: dict[str, dict[int, int]] = {}
        for actor in ("Embedder", "Protector"):
            found[actor] = {}
            for images in sizes:
                with spawn.Pool(1) as pool:
                    found[actor][images] = pool.apply(peak, (actor, folder / str(images)))
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    found = peaks()
    origin = where()
    print(f"memory: {origin['machine']}, commit {origin['commit']}; largest resident size of one worker process")
    rows = []
    for actor, sizes in found.items():
        ratio = sizes[LARGE] / sizes[SMALL]
        megabytes = "   ".join(f"{images:,} images {size / 1e6:,.0f} MB" for images, size in sizes.items())
        print(f"  {actor:10} {megabytes}   ratio {ratio:.3f}   allowed {1 - ALLOWED:.2f} to {1 + ALLOWED:.2f}")
        rows.append({"actor": actor, "bytes": sizes, "ratio": ratio})
    write("memory", {"rows": rows, "allowed": ALLOWED})


if __name__ == "__main__":
    main()
