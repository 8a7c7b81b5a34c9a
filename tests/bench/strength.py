"""What options of a protection are worth, judged on images that are not the test images:

  python tests/bench/strength.py --output strength/ --arm 'default=' --arm 'two robust=--robust-proxies 2' \\
      --arm 'steps=--generator sample' --regimes nt,at,lowpass:8

A quarter of the training images, chosen by key, is the judge. The others are protected, once for every arm and fit, and
learned from; clean ones as well. Everything is kept in --output, so the same command goes on where it was stopped, and
further arms can be added. Test images are not read: report on them once, with tests/bench/relearning_table.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from pipeline.hashing import in_sample
from pipeline.records import Rejection
from pipeline.shards.inputs import resolve_input
from pipeline.shards.tar import ShardWriter, read_samples

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.commands import run  # noqa: E402

JUDGE = 0.25  # share of the training images
EMBEDDED = ("--surrogate", "timm:tf_efficientnet_lite0", "--encode", "lossless")


def split(train: str, folder: Path) -> tuple[str, str]:
    """Shards of the images to protect and of those that judge, written once; returns both inputs."""
    store, entries, *_ = resolve_input(train)
    parts = [folder / "fit", folder / "judge"]
    for entry in entries:
        paths = [part / Path(entry.name).name for part in parts]
        if all(path.exists() for path in paths):
            continue
        for part in parts:
            part.mkdir(parents=True, exist_ok=True)
        unfinished = [path.with_name(f"{path.name}.part") for path in paths]
        compressed = entry.name.endswith(".gz")
        fit, judge = (ShardWriter(path, compressed=compressed) for path in unfinished)
        with store.open(entry.name) as stream, fit, judge:
            for sample in read_samples(stream, max_member_bytes=1 << 24):
                assert not isinstance(sample, Rejection), sample
                (judge if in_sample(JUDGE, 0, "strength", sample.key) else fit).write(sample)
        for path, done in zip(unfinished, paths, strict=True):
            path.rename(done)
    return f"{parts[0]}/*.tar*", f"{parts[1]}/*.tar*"


def named(text: str) -> tuple[str, list[str]]:
    """NAME=OPTIONS of protect_imagenet.py."""
    name, found, options = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS")
    return name.replace(" ", "-"), shlex.split(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", default="data/cifar10/cifar10-train-*.tar.gz")
    add("--output", type=Path, required=True)
    add("--arm", type=named, action="append", required=True, help="NAME=OPTIONS of protect_imagenet.py; several times")
    add("--fits", type=int, default=1, help="of every arm, with different seeds")
    add("--regimes", default="nt,at,iss-jpeg10-train,lowpass:8")
    add("--clusters", default="10")
    add("--targets", default="small")
    add("--epochs", default="12")
    options = parser.parse_args()
    output = options.output.resolve()
    fit, judge = split(options.train, output / "split")
    protected = []
    for name, chosen in options.arm:
        urls = [str(output / f"{name}-{seed}") for seed in range(options.fits)]
        for seed, url in enumerate(urls):
            given = ["--input", fit, "--output", url, "--seed", str(seed), *EMBEDDED]
            run("jobs/protect_imagenet.py", *given, "--clusters", options.clusters, *chosen)
        protected.append(f"{name}={','.join(urls)}")
    given = ["--clean", fit, "--test", judge, "--output", str(output / "evaluation"), "--protected", *protected]
    given += ["--regimes", options.regimes, "--targets", options.targets, "--epochs", options.epochs, "--seeds", "0"]
    run("jobs/evaluate_relearning.py", *given)
    run("tests/bench/relearning_table.py", str(output / "evaluation/results.parquet"))


if __name__ == "__main__":
    main()
