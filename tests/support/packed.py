"""Small collections to pack, and what was packed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.records import Sample
from tests.support.samples import image_bytes, noise, read


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def jpeg(seed: int) -> bytes:
    return image_bytes(noise(8, 8, seed=seed), "JPEG")


def photos(folder: Path, classes: str = "abc", count: int = 4) -> Path:
    files = {f"{name}/deep/{n}.JPEG": jpeg(10 * ord(name) + n) for name in classes for n in range(count)}
    return write(folder, files)


def packed(folder: Path) -> list[Sample]:
    """All samples, which are all whole, in the order of the shards."""
    found = [one for path in sorted(folder.glob("*.tar")) for one in read(path.read_bytes())]
    assert all(isinstance(one, Sample) for one in found)
    return found  # type: ignore[return-value]


def about(sample: Sample) -> dict[str, object]:
    return json.loads(sample.members["json"])  # type: ignore[no-any-return]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}
