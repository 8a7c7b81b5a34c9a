"""Speed of the stage `apply` against its codecs alone:  python tests/bench/bench_apply.py [--processes N]

Ours: the actor `Protector` itself, from an input shard in a local folder to its commit. Plain: Pillow decodes the same
JPEGs and encodes the very pixels that ours encodes, in the same order and alternation, as ours does: for `jpeg:95` at
quality 95 without chroma subsampling, for `same` with the tables and the subsampling that came; it reads no shard, adds
nothing, checks nothing and writes nothing. As many processes measure at once, in step, as the machine has CPUs. Images:
crops of real photographs, 4:2:0 JPEGs of quality 90, a label beside each.

--loop: plain is the loop that a user would write: tarfile reads the shard and writes another, JPEGs at quality 95.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photo_shards import QUALITY, write_shards
from PIL import Image
from ratio import Timing, in_turns, publish, row

from actors.cluster.batches import RunContext, shard_rows
from actors.protector import Protector
from pipeline import layout
from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.apply import LaidDeltas
from pipeline.deltas.protection import Protection
from pipeline.hashing import numpy_rng
from pipeline.records import Sample, Shard
from pipeline.settings import Settings
from pipeline.shards.tar import read_samples
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet

CLUSTERS, DELTA_SIDE, LEVELS = 10, 64, 16


@dataclass(frozen=True)
class Case:
    """One size of image, and how many of them a shard and a process have."""

    width: int
    height: int
    per_shard: int
    shards: int
    rounds: int
    encode: str
    needed: float

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height} {self.encode}"


CASES = tuple(
    Case(*size, encode, needed)
    for encode in ("same", "jpeg:95")
    for size, needed in (((160, 160, 500, 2, 12), 0.85), ((500, 375, 100, 6, 12), 1.0))
)
PLAIN = {"same": {"quality": QUALITY, "subsampling": 2}, "jpeg:95": {"quality": 95, "subsampling": 0}}


def protection() -> Protection:
    """Deltas that use the whole bound and are equal in all channels, as fitted ones are by default."""
    signs = numpy_rng(0, "bench-delta").integers(0, 2, (CLUSTERS, 1, DELTA_SIDE, DELTA_SIDE)) * 2 - 1
    rows = np.zeros((CLUSTERS, 4), np.float32)
    return Protection(
        method="uc",
        generator="direct",
        surrogate_id="bench",
        epsilon=LEVELS / 255,
        clustering=Clustering(ClusterSpace(), rows, rows, rows[:, 0]),
        targets=tuple((cluster + 1) % CLUSTERS for cluster in range(CLUSTERS)),
        levels=np.repeat((LEVELS * signs).astype(np.int8), 3, axis=1),
        fingerprint="bench",
    )


class Bench:
    """One process's shards, and both ways to go through one of them."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.case, self.folder = case, folder
        self.paths = write_shards(
            folder / "in", shards=case.shards, per_shard=case.per_shard, width=case.width, height=case.height
        )
        self.source, self.output = Store(str(folder / "in")), Store(str(folder / "out"))
        self.shards = [Shard(entry.name, entry.size, entry.etag) for entry in self.source.list()]
        self.output.put(layout.PROTECTION, protection().to_bytes())
        for shard, path in zip(self.shards, self.paths, strict=True):
            keys = tuple(sample.key for sample in samples_of(path))
            clusters = np.arange(len(keys), dtype=np.int32) % CLUSTERS
            assignment = Assignment(shard.name, keys, clusters, np.zeros(len(keys), np.float32))
            self.output.put(layout.assignment(shard.name), assignment_to_parquet(assignment))
        context = RunContext(self.source, self.output, Settings(encode=case.encode), "bench", threads=1, device="cpu")
        self.protector = Protector(context)
        self.seconds: Counter[str] = Counter()
        self._plain: tuple[int, list[tuple[bytes, Image.Image]]] = (-1, [])

    def prepare(self, number: int) -> None:
        """Before a round, unmeasured: no commit is left, and what the plain way encodes is at hand."""
        index = number % len(self.shards)
        if self._plain[0] != index:
            self._plain = (index, self._inputs(index))
        self.output.delete([layout.commit(self.shards[index].name), self.shards[index].name])

    def ours(self, number: int) -> int:
        """Shard to commit."""
        self.protector({field: [value] for field, value in shard_rows([self._shard(number)])[0].items()})
        return self.case.per_shard

    def plain(self, number: int) -> int:
        """Decode, encode."""
        for data, protected in self._plain[1]:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            protected.save(io.BytesIO(), "JPEG", **PLAIN[self.case.encode])
        return self.case.per_shard

    def loop(self, number: int) -> int:
        """Read a tar, decode, encode at quality 95, write a tar."""
        protected = iter([image for _, image in self._plain[1]])
        path = self.paths[number % len(self.shards)]
        with tarfile.open(path) as source, tarfile.open(self.folder / "plain.tar", "w") as made:
            for member in source:
                data = source.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".jpg"):
                    file = io.BytesIO()
                    with Image.open(io.BytesIO(data)) as image:
                        image.load()
                    next(protected).save(file, "JPEG", **PLAIN["jpeg:95"])
                    data = file.getvalue()
                    member.size = len(data)
                made.addfile(member, io.BytesIO(data))
        return self.case.per_shard

    def committed(self, number: int) -> dict[str, float]:
        """The stages' own seconds, after a check that everything was protected."""
        commit = json.loads(self.output.read(layout.commit(self._shard(number).name)))
        if commit["num_protected"] != self.case.per_shard:
            raise SystemExit(f"only {commit['num_protected']} of {self.case.per_shard} images were protected")
        return dict(commit["seconds"])

    def _shard(self, number: int) -> Shard:
        return self.shards[number % len(self.shards)]

    def _inputs(self, index: int) -> list[tuple[bytes, Image.Image]]:
        """The JPEGs of a shard, each with the picture that ours would encode."""
        deltas, pairs = self.protector.deltas, []
        assert isinstance(deltas, LaidDeltas)  # of --generator direct
        for number, sample in enumerate(samples_of(self.paths[index])):
            data = sample.members["jpg"]
            pixels = np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)
            pixels += deltas.delta_for(number % CLUSTERS, sample.key, *pixels.shape[:2]).levels
            pairs.append((data, Image.fromarray(pixels.clip(0, 255).astype(np.uint8))))
        return pairs


def samples_of(path: Path) -> list[Sample]:
    with path.open("rb") as stream:
        return [item for item in read_samples(stream, max_member_bytes=1 << 28) if isinstance(item, Sample)]


def measure(case: Case, folder: Path, barrier: Any, is_loop: bool) -> tuple[list[dict[str, Timing]], dict[str, float]]:
    """What one process finds: timings of every round, and seconds per image of each stage."""
    torch.set_num_threads(1)
    bench = Bench(folder, case)
    seconds: Counter[str] = Counter()

    def ours(number: int) -> int:
        done = bench.ours(number)
        seconds.update(bench.committed(number)) if number else None
        return done

    taken = []
    numbers = iter(range(10**6))

    def wait() -> None:
        bench.prepare(next(numbers) // 2)
        barrier.wait()

    taken = in_turns(ours, bench.loop if is_loop else bench.plain, case.rounds, wait)
    images = case.rounds * case.per_shard
    return taken, {stage: spent / images for stage, spent in seconds.items()}


def in_processes(
    case: Case, folder: Path, processes: int, is_loop: bool
) -> tuple[list[dict[str, Timing]], dict[str, float]]:
    """The same in several processes, in step; all their rounds."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        barrier = manager.Barrier(processes)
        jobs = [(case, folder / str(number), barrier, is_loop) for number in range(processes)]
        found = pool.starmap(measure, jobs, chunksize=1)
    taken = [one for timings, _ in found for one in timings]
    stages = found[0][1]
    return taken, {stage: statistics.mean(one[1].get(stage, 0.0) for one in found) for stage in stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this size")
    parser.add_argument("--loop", action="store_true", help="beside a plain loop from tar to tar")
    options = parser.parse_args()
    rows, stages = [], {}
    for case in CASES:
        if options.case in (None, case.name):
            folder = Path(tempfile.mkdtemp(prefix="bench-apply-"))
            try:
                taken, seconds = in_processes(case, folder, options.processes, options.loop)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            rows.append(row(f"{case.name} JPEG, {options.processes} processes", "images", taken, case.needed))
            stages[case.name] = {stage: round(1e6 * spent, 1) for stage, spent in seconds.items()}
    result = "apply_loop" if options.loop else "apply"
    publish("apply", rows, {"microseconds_per_image": stages}, result=result)
    for name, spent in stages.items():
        print(f"  {name} us/image: " + "  ".join(f"{stage} {value}" for stage, value in spent.items()))


if __name__ == "__main__":
    main()
