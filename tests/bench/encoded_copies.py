"""Whether smaller files teach more: protections written in several encodings, judged alike:

  python tests/bench/encoded_copies.py --output copies/ --protected distilled-0 distilled-1 distilled-2

The training images are written as JPEGs of quality 92, 4:2:0, as people have them. The protection of every run given is
applied to them once for each encoding, and a target learns from each copy. Everything is kept in --output, so the same
command goes on where it was stopped. The last lines give the median size of the files, and the accuracies.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.records import Rejection, Sample
from pipeline.shards.inputs import resolve_input
from pipeline.shards.tar import ShardWriter, read_samples

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.commands import run  # noqa: E402

ENCODINGS = {"same": "same", "jpeg95": "jpeg:95", "lossless": "lossless"}
QUALITY = 92


def as_jpeg(sample: Sample) -> Sample:
    """The sample with its image as a JPEG."""
    (suffix,) = sample.members.keys() & {"jpg", "png", "webp"}
    file = io.BytesIO()
    Image.open(io.BytesIO(sample.members[suffix])).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    others = {name: data for name, data in sample.members.items() if name != suffix}
    return Sample(sample.key, {"jpg": file.getvalue()} | others)


def jpegs(train: str, folder: Path) -> str:
    """Shards of the images as JPEGs, written once; returns the input they make."""
    store, entries, *_ = resolve_input(train)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = folder / Path(entry.name).name.removesuffix(".gz")
        if path.exists():
            continue
        unfinished = path.with_name(f"{path.name}.part")
        with store.open(entry.name) as stream, ShardWriter(unfinished, compressed=False) as writer:
            for sample in read_samples(stream, max_member_bytes=1 << 24):
                assert not isinstance(sample, Rejection), sample
                writer.write(as_jpeg(sample))
        unfinished.rename(path)
    return f"{folder}/*.tar"


def median_size(folder: Path) -> float:
    """Median bytes of the pictures in a folder's shards."""
    sizes = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            sizes += [member.size for member in archive if member.name.rpartition(".")[2] in ("jpg", "png")]
    return float(np.median(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", default="data/cifar10/cifar10-train-*.tar.gz")
    add("--test", default="data/cifar10/cifar10-test-*.tar.gz")
    add("--output", type=Path, required=True)
    add("--protected", type=Path, nargs="+", required=True, help="outputs of protection runs, one for each fit")
    add("--regimes", default="nt")
    add("--targets", default="small")
    add("--seeds", default="0")
    options = parser.parse_args()
    output = options.output.resolve()
    clean = jpegs(options.train, output / "clean")
    copies: dict[str, list[Path]] = {}
    for name, encode in ENCODINGS.items():
        for number, fit in enumerate(options.protected):
            copy = output / f"{name}-{number}"
            protection = str(fit.resolve() / "_scumble/protection.safetensors")
            given = ["--input", clean, "--output", str(copy), "--protection", protection, "--encode", encode]
            run("jobs/protect_imagenet.py", *given)
            copies.setdefault(name, []).append(copy)
    given = ["--clean", clean, "--test", options.test, "--output", str(output / "evaluation")]
    given += ["--protected", *(f"{name}={','.join(map(str, folders))}" for name, folders in copies.items())]
    given += ["--regimes", options.regimes, "--targets", options.targets, "--seeds", options.seeds]
    run("jobs/evaluate_relearning.py", *given)
    original = median_size(output / "clean")
    for name, folders in copies.items():
        sizes = [median_size(folder) / original for folder in folders]
        print(f"{name}: {min(sizes):.2f} to {max(sizes):.2f} times the size of the original JPEGs (medians)")
    run("tests/bench/relearning_table.py", str(output / "evaluation/results.parquet"))


if __name__ == "__main__":
    main()
