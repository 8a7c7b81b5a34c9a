"""Shards of real photographs in any number and size: crops of the pictures inside scikit-image and scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.hashing import numpy_rng
from pipeline.records import Sample
from pipeline.shards.photographs import PHOTOGRAPHS, photograph
from pipeline.shards.tar import ShardWriter

QUALITY = 90  # of the input: what cameras and web sites use, with Pillow's 4:2:0


def crops(count: int, width: int, height: int, *, seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """`count` different uint8 [height, width, 3], cut from each colour photograph in turn."""
    sources = [photograph(name) for name in PHOTOGRAPHS]
    sources = [pixels for pixels in sources if pixels.ndim == 3]
    for number in range(count):
        pixels = sources[number % len(sources)]
        rng = numpy_rng(seed, "bench-crop", number)
        fit = min(1.0, pixels.shape[0] / height, pixels.shape[1] / width)
        scale = fit * rng.uniform(0.5, 1.0)
        cut_height, cut_width = int(height * scale), int(width * scale)
        y = int(rng.integers(0, pixels.shape[0] - cut_height + 1))
        x = int(rng.integers(0, pixels.shape[1] - cut_width + 1))
        image = Image.fromarray(pixels[y : y + cut_height, x : x + cut_width])
        yield np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def samples(count: int, width: int, height: int, *, seed: int = 0) -> Iterator[Sample]:
    """JPEGs with a label beside each, as ImageNet stands in WebDataset shards."""
    for number, pixels in enumerate(crops(count, width, height, seed=seed)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        yield Sample(f"{number:06d}", {"jpg": file.getvalue(), "cls": str(number % 10).encode()})


def write_shards(
    folder: Path, *, shards: int, per_shard: int, width: int, height: int, distinct: int | None = None
) -> list[Path]:
    """shard-00000N.tar in `folder`; `distinct` pictures (None = all) come back under new keys once they are used up."""
    folder.mkdir(parents=True, exist_ok=True)
    total = shards * per_shard
    made = list(samples(min(total, distinct or total), width, height))
    paths = []
    for index in range(shards):
        path = folder / f"shard-{index:06d}.tar"
        with ShardWriter(path, compressed=False) as writer:
            for number in range(index * per_shard, (index + 1) * per_shard):
                writer.write(Sample(f"{number:06d}", made[number % len(made)].members))
        paths.append(path)
    return paths
