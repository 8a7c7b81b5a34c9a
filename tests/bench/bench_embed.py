"""Speed of the stage `embed` against a plain loop:  python tests/bench/bench_embed.py [--ray]

Both take JPEGs of 500x375 pixels from tar shards, decode them at a reduced DCT scale, resize and crop them to 160
pixels, and embed them with the surrogate that ships inside, 32 at a time. By default both run in one process that is
held to one CPU. With --ray the stage itself runs, two actors of one CPU each, from its second answer on (the start of
Ray and of the actors is not in it), against two processes of the plain loop.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photo_shards import write_shards
from PIL import Image
from ratio import Timing, in_turns, publish, row
from torch import Tensor

from actors.cluster.batches import RunContext
from actors.cluster.connect import Workers, connected
from actors.embedder import Embedder
from jobs.protection.stages import over_shards
from pipeline.records import Shard
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.shards.tar import read_samples
from pipeline.storage.store import Store
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.surrogate import Surrogate, load_surrogate

NEEDED = 0.90
SIDE, BATCH, WIDTH, HEIGHT = 160, 32, 500, 375
SHARDS, PER_SHARD, DISTINCT, PROCESSES = 24, 96, 480, 2
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PlainLoop:
    """What one writes on an afternoon who knows the libraries: no threads, no checks, no quarantine, no Parquet."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate

    def embed(self, path: Path) -> tuple[list[str], np.ndarray]:
        """Keys and features of one shard."""
        keys: list[str] = []
        batch: list[Tensor] = []
        blocks: list[np.ndarray] = []
        for key, data in self._images(path):
            keys.append(key)
            batch.append(self._square(data))
            if len(batch) == BATCH:
                blocks.append(self._features(batch))
                batch = []
        if batch:
            blocks.append(self._features(batch))
        return keys, np.concatenate(blocks)

    @staticmethod
    def _images(path: Path) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name[:-4], file.read()

    def _square(self, data: bytes) -> Tensor:
        shorter, side = self.surrogate.resize, self.surrogate.input_size
        image: Image.Image = Image.open(io.BytesIO(data))
        image.draft("RGB", (shorter, shorter))
        image = image.convert("RGB")
        scale = shorter / min(image.size)
        size = (int(image.width * scale), int(image.height * scale))
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        image = image.resize(size, FILTERS[self.surrogate.interpolation]).crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _features(self, batch: list[Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return self.surrogate.embed(torch.stack(batch).float().div_(255)).numpy()


def the_surrogate() -> Surrogate:
    return load_surrogate(EMBEDDED_SURROGATE, weights=None, size=SIDE, device="cpu")


def one_cpu(paths: list[Path]) -> list[dict[str, Timing]]:
    """Ours and the plain loop in turns, a shard each time, on one CPU."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    surrogate = the_surrogate()
    loop = PlainLoop(surrogate)

    def ours_of(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
        with path.open("rb") as stream:
            features, rejections, _ = embed_shard(
                read_samples(stream, max_member_bytes=1 << 28),
                surrogate,
                shard=path.name,
                batch_size=BATCH,
                threads=1,
                max_pixels=100_000_000,
            )
        assert not rejections
        return features.keys, features.values

    (ours_keys, ours), (plain_keys, plain) = ours_of(paths[0]), loop.embed(paths[0])
    cosine = (ours * plain).sum(1) / np.linalg.norm(ours.astype(np.float32), axis=1) / np.linalg.norm(plain, axis=1)
    if list(ours_keys) != plain_keys or cosine.min() < 0.97:
        raise SystemExit(f"the two do not embed the same: lowest cosine {cosine.min():.3f}, mean {cosine.mean():.4f}")
    return in_turns(
        lambda number: len(ours_of(paths[number % SHARDS])[0]),
        lambda number: len(loop.embed(paths[number % SHARDS])[0]),
        SHARDS,
    )


def plain_process(paths: list[Path], barrier: Any) -> tuple[float, float, float]:
    """When this process began and ended, and its processor seconds."""
    torch.set_num_threads(1)
    loop = PlainLoop(the_surrogate())
    loop.embed(paths[0])
    barrier.wait()
    begin, cpu = time.time(), time.process_time()
    for path in paths:
        loop.embed(path)
    return begin, time.time(), time.process_time() - cpu


def plain_processes(paths: list[Path]) -> Timing:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(PROCESSES) as pool:
        barrier = manager.Barrier(PROCESSES)
        parts = [(paths[number::PROCESSES], barrier) for number in range(PROCESSES)]
        found = pool.starmap(plain_process, parts, chunksize=1)
    wall = max(end for _, end, _ in found) - min(begin for begin, _, _ in found)
    return Timing(len(paths) * PER_SHARD, sum(cpu for _, _, cpu in found), wall)


def stage(folder: Path, output: Path) -> Timing:
    """The stage, from the answer after which every actor has given one; processor seconds are not known here."""
    source = Store(str(folder))
    shards = [Shard(entry.name, entry.size, entry.etag) for entry in source.list()]
    settings = Settings(surrogate=EMBEDDED_SURROGATE, surrogate_size=SIDE, workers=PROCESSES)
    context = RunContext(source, Store(str(output)), settings, "bench", threads=1, device="cpu")
    images, begin, end = 0, 0.0, 0.0
    with connected(settings):
        for number, done in enumerate(over_shards(shards, Embedder, (context, None), Workers(PROCESSES, 1.0, 0.0))):
            end = time.perf_counter()
            if number < PROCESSES:
                begin = end
            else:
                images += done.images
    return Timing(images, end - begin, end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", action="store_true", help="the Ray Data stage, against two plain processes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-embed-"))
    try:
        paths = write_shards(
            folder / "in", shards=SHARDS, per_shard=PER_SHARD, width=WIDTH, height=HEIGHT, distinct=DISTINCT
        )
        what = f"{WIDTH}x{HEIGHT} JPEG, {SIDE} px, {SHARDS * PER_SHARD} images"
        if not options.ray:
            rows = [row(f"{what}, 1 CPU", "images", one_cpu(paths), NEEDED)]
            publish("embed", rows)
            return
        before, ours, after = plain_processes(paths), stage(folder / "in", folder / "out"), plain_processes(paths)
        taken = [{"ours": ours, "plain": before}, {"ours": ours, "plain": after}]
        rows = [row(f"{what}, Ray, {PROCESSES} actors (wall only)", "images", taken, NEEDED)]
        publish("embed", rows, result="embed_ray")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
