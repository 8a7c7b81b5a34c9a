"""Small makers of images and shards that several tests share."""

from __future__ import annotations

import io
import socket
import tarfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.deltas.delta import lay
from pipeline.records import Commit, Rejection, Sample, Shard
from pipeline.shards.tar import read_samples


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [height, width, channels] of every value, 0 and 255 included."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def image_bytes(pixels: NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    """`pixels` as a file that Pillow wrote."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tar_bytes(members: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w", **options: Any) -> bytes:
    """A tar written by the standard library, member by member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes, max_member_bytes: int = 1 << 20) -> list[Sample | Rejection]:
    """Everything that `read_samples` yields for `data`."""
    return list(read_samples(io.BytesIO(data), max_member_bytes=max_member_bytes))


class ExtremeDeltas:
    """A delta source that uses the whole bound everywhere: +-16 levels, per cluster another pattern."""

    epsilon = 16 / 255
    per_sample = False

    def __init__(self, side: int = 24) -> None:
        signs = np.random.default_rng(7).integers(0, 2, (8, 3, side, side)) * 2 - 1
        self.levels = (16 * signs).astype(np.int8)

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        return lay(self.levels[cluster], height, width, self.epsilon)


def stripes(
    count: int,
    seed: int,
    *,
    periods: tuple[int, ...] = (4, 16),
    contrast: tuple[float, float] = (20, 60),
    deviation: float = 20,
) -> tuple[Tensor, Tensor]:
    """Easy classes, two per period: horizontal and vertical stripes, in random colours under noise; 32 px."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2 * len(periods), count)
    position = np.indices((32, 32))
    images = np.empty((count, 3, 32, 32))
    for row, label in enumerate(labels):
        wave = np.sign(np.sin(2 * np.pi * position[label % 2] / periods[label // 2] + rng.uniform(0, 6)))
        images[row] = 128 + rng.uniform(*contrast, (3, 1, 1)) * wave + rng.normal(0, deviation, (3, 32, 32))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def commit_of(shard: Shard, fingerprint: str) -> Commit:
    counts = {"num_protected": 1, "num_quarantined": 0, "num_members": 1, "max_abs_delta": 16}
    sizes = {"output_size": 1, "input_image_bytes": 1, "output_image_bytes": 1}
    digests = {"output_sha256": "d", "protection_sha256": "p", "input_etag": shard.etag, "input_size": shard.size}
    rest = {"quarantine": {}, "clusters": {"1": 1}, "seconds": {"put": 0.1}}
    return Commit(fingerprint=fingerprint, shard=shard.name, **counts, **sizes, **digests, **rest)  # type: ignore[arg-type]


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
