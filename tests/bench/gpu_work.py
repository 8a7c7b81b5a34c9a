"""What one process of bench_gpu.py does: decode, embed, codec or apply, over shards that lie in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.apply import LaidDeltas, protect_shard
from pipeline.clusters import Clustering, ClusterSpace
from pipeline.embed import EmbedSeconds, embed_shard
from pipeline.fingerprint import numpy_rng
from pipeline.picture import decode_rgb
from pipeline.protection import Protection
from pipeline.records import Sample
from pipeline.settings import Settings
from pipeline.surrogate import load_surrogate
from pipeline.tar import ShardWriter, read_samples

SURROGATE = "open_clip:ViT-B-32/random-0"
CLUSTERS, DELTA_SIDE, LEVELS = 8, 64, 16
CODEC_IMAGES = 64  # different images per process of Codec; they come again until as many are done


@dataclass(frozen=True)
class Bench:
    """What every process must know; shards are dealt to processes in turn."""

    device: str
    paths: tuple[Path, ...]
    per_shard: int
    width: int
    height: int
    batch_size: int
    rounds: int
    input_size: int  # of the surrogate


class Work(Protocol):
    """What one process does with some shards; built once, unmeasured."""

    def __call__(self, paths: Sequence[Path]) -> int:
        """Number of images done."""

    def notes(self) -> dict[str, float]:
        """Anything worth keeping, summed since it was built."""


def stream_samples(path: Path) -> Iterator[Sample]:
    with path.open("rb") as stream:
        for item in read_samples(stream, max_member_bytes=1 << 28):
            if not isinstance(item, Sample):
                raise RuntimeError(f"{path}: {item}")
            yield item


class Decode:
    """JPEGs in memory -> pixels at the surrogate's size."""

    def __init__(self, bench: Bench, threads: int, paths: Sequence[Path]) -> None:
        self.images = {path: [sample.members["jpg"] for sample in stream_samples(path)] for path in paths}
        self.pool = ThreadPoolExecutor(threads)
        self.decode = partial(decode_rgb, at_least=bench.input_size, max_pixels=10**8, suffix="jpg")

    def __call__(self, paths: Sequence[Path]) -> int:
        return sum(1 for path in paths for pixels in self.pool.map(self._sides, self.images[path]) if pixels)

    def _sides(self, data: bytes) -> int:
        return self.decode(data).size  # not the pixels: they would wait in memory

    def notes(self) -> dict[str, float]:
        return {}


class Embed:
    """Shards -> features: the whole stage but for the store."""

    def __init__(self, bench: Bench, threads: int, paths: Sequence[Path]) -> None:
        self.bench, self.threads = bench, threads
        self.surrogate = load_surrogate(SURROGATE, weights=None, size=None, device=bench.device)
        self.seconds = EmbedSeconds()

    def __call__(self, paths: Sequence[Path]) -> int:
        done = 0
        for path in paths:
            features, rejections, seconds = embed_shard(
                stream_samples(path),
                self.surrogate,
                shard=path.name,
                batch_size=self.bench.batch_size,
                threads=self.threads,
                max_pixels=10**8,
            )
            if rejections or len(features.keys) != self.bench.per_shard:
                raise RuntimeError(f"{path}: {len(features.keys)} embedded, {len(rejections)} rejected")
            done += len(features.keys)
            for name, spent in asdict(seconds).items():
                setattr(self.seconds, name, getattr(self.seconds, name) + spent)
        return done

    def notes(self) -> dict[str, float]:
        return {f"{name}_s": spent for name, spent in asdict(self.seconds).items()}


class Codec:
    """Pillow alone: decode the input, encode the pixels that `apply` would encode."""

    def __init__(self, bench: Bench, threads: int, paths: Sequence[Path]) -> None:
        self.per_shard, self.pairs = bench.per_shard, []
        deltas = protection()
        for number, sample in enumerate(islice(stream_samples(paths[0]), CODEC_IMAGES)):
            data = sample.members["jpg"]
            pixels = np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)
            pixels += deltas.delta_for(number % CLUSTERS, sample.key, *pixels.shape[:2])
            self.pairs.append((data, Image.fromarray(pixels.clip(0, 255).astype(np.uint8))))

    def __call__(self, paths: Sequence[Path]) -> int:
        for number in range(self.per_shard * len(paths)):
            data, protected = self.pairs[number % len(self.pairs)]
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            protected.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
        return self.per_shard * len(paths)

    def notes(self) -> dict[str, float]:
        return {}


class Apply:
    """Shards -> protected shards: the whole stage but for store and commit."""

    def __init__(self, bench: Bench, threads: int, paths: Sequence[Path]) -> None:
        self.deltas = LaidDeltas(protection())
        self.clusters = {f"{number:06d}": number % CLUSTERS for number in range(bench.per_shard)}
        self.settings = Settings()
        self.seconds: dict[str, float] = {}

    def __call__(self, paths: Sequence[Path]) -> int:
        done = 0
        for path in paths:
            output = path.with_suffix(".protected")
            with ShardWriter(output, compressed=False) as writer:
                outcome = protect_shard(
                    stream_samples(path), writer, self.deltas, self.clusters, settings=self.settings
                )
            output.unlink()
            if outcome.num_protected != len(self.clusters) or outcome.max_abs_delta != LEVELS:
                raise RuntimeError(f"{path}: {outcome.num_protected} protected, {outcome.max_abs_delta} levels")
            done += outcome.num_protected
            for stage, spent in outcome.seconds.items():
                self.seconds[f"{stage}_s"] = self.seconds.get(f"{stage}_s", 0.0) + spent
        return done

    def notes(self) -> dict[str, float]:
        return dict(self.seconds)


def protection() -> Protection:
    """Random deltas that use the whole bound."""
    signs = numpy_rng(0, "bench-delta").integers(0, 2, (CLUSTERS, 3, DELTA_SIDE, DELTA_SIDE)) * 2 - 1
    rows = np.zeros((CLUSTERS, 4), np.float32)
    return Protection(
        method="uc",
        generator="direct",
        surrogate_id="bench",
        epsilon=LEVELS / 255,
        clustering=Clustering(ClusterSpace(), rows, rows, rows[:, 0]),
        targets=tuple((cluster + 1) % CLUSTERS for cluster in range(CLUSTERS)),
        levels=(LEVELS * signs).astype(np.int8),
        fingerprint="bench",
    )
