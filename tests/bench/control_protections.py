"""Shards of control protections, beside which others are judged:

  python tests/bench/control_protections.py --input 'data/train-*.tar.gz' --output controls/

writes controls/class-random and controls/separable: the same names, keys and labels, images lossless. Both need the
labels and protect against ordinary training only; a target that learns in spite of them shows a broken evaluation.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from controls import control
from numpy.typing import NDArray
from PIL import Image

from pipeline.records import Rejection, Sample
from pipeline.shards.inputs import resolve_input
from pipeline.shards.tar import ShardWriter, read_samples
from pipeline.storage.store import Store

CONTROLS = {"class-random": "random", "separable": "sp"}


def read(store: Store, shard: str) -> list[tuple[str, str, NDArray[np.uint8], bytes]]:
    """Key, label text, pixels and the other members' JSON of every sample."""
    found = []
    with store.open(shard) as stream:
        for sample in read_samples(stream, max_member_bytes=1 << 24):
            assert not isinstance(sample, Rejection), sample
            (image,) = (data for suffix, data in sample.members.items() if suffix in ("webp", "png", "jpg"))
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
            found.append((sample.key, sample.members["cls"].decode(), pixels, sample.members.get("json", b"{}")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    store, entries, *_ = resolve_input(options.input)
    shards = {entry.name: read(store, entry.name) for entry in entries}
    labels = np.array([int(label) for samples in shards.values() for _, label, _, _ in samples], np.int64)
    images = np.stack([pixels for samples in shards.values() for _, _, pixels, _ in samples]).transpose(0, 3, 1, 2)
    for name, method in CONTROLS.items():
        made = iter(control(method, images, labels).transpose(0, 2, 3, 1))
        (options.output / name).mkdir(parents=True, exist_ok=True)
        for shard, samples in shards.items():
            path = options.output / name / Path(shard).name
            with ShardWriter(path, compressed=path.suffix == ".gz") as writer:
                for key, label, _, about in samples:
                    file = io.BytesIO()
                    Image.fromarray(next(made)).save(file, "PNG")
                    members = {"png": file.getvalue(), "cls": label.encode(), "json": about}
                    writer.write(Sample(key, members))
        print(f"{options.output / name}: {len(labels):,} images in {len(shards)} shards")


if __name__ == "__main__":
    main()
