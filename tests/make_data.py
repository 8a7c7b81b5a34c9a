"""Make the small data sets that tests and results need, from public copies that were unpacked on this machine.

  python tests/make_data.py --cifar10 cifar-10-batches-py --imagenette imagenette2-320 \\
      --tiny-imagenet tiny-imagenet-200 --output data

Any of the three may be left out. Written are WebDataset shards; a sample is an image, its class (.cls), and where it
comes from (.json):

  OUTPUT/cifar10/         10 classes, 600 training and 200 test images each, 32 px, the exact pixels
  OUTPUT/imagenette/      10 classes, 70 and 28, 144 px, JPEG
  OUTPUT/tinyimagenet32/  100 classes with everyday names, 160 and 30, 32 px, JPEG

CIFAR-10 is cut and ordered exactly as for the published results. Of the other two the images are drawn anew, by a
fixed seed: figures measured on them may differ a little from the published ones.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.hashing import numpy_rng
from pipeline.packing.arrays import cifar_batch
from pipeline.records import Sample
from pipeline.shards.tar import ShardWriter

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# images of data_batch_1 to 5 and of test_batch that were at hand when the set was first cut
AT_HAND = {1: 4000, 2: 1017, 3: 1017, 4: 1017, 5: 1017, 0: 1017}
CIFAR10_TRAIN, CIFAR10_TEST = 600, 200
CIFAR10_ORDER = {"train": 7, "test": 8}  # seeds
IMAGENETTE = {
    "n01440764": (0, "tench"),
    "n02102040": (217, "English springer"),
    "n02979186": (482, "cassette player"),
    "n03000684": (491, "chain saw"),
    "n03028079": (497, "church"),
    "n03394916": (566, "French horn"),
    "n03417042": (569, "garbage truck"),
    "n03425413": (571, "gas pump"),
    "n03445777": (574, "golf ball"),
    "n03888257": (701, "parachute"),
}
IMAGENETTE_TRAIN, IMAGENETTE_TEST, IMAGENETTE_SIDE = 70, 28, 144
# those of the 200 classes whose name can be told at 32 px
_TINY_IMAGENET = """
n01443537 n01629819 n01641577 n01698640 n01742172 n01770393 n01774750 n01855672 n01882714 n01910747
n01917289 n01944390 n01983481 n02002724 n02056570 n02074367 n02085620 n02094433 n02099601 n02106662
n02113799 n02123045 n02123394 n02124075 n02125311 n02129165 n02132136 n02165456 n02206856 n02233338
n02236044 n02268443 n02279972 n02364673 n02395406 n02403003 n02410509 n02415577 n02437312 n02480495
n02481823 n02486410 n02504458 n02509815 n02666196 n02769748 n02791270 n02793495 n02802426 n02814860
n02823428 n02843684 n02917067 n02948072 n02950826 n03085013 n03100240 n03160309 n03201208 n03388043
n03393912 n03400231 n03447447 n03544143 n03599486 n03649909 n03662601 n03837869 n03854065 n03977966
n04070727 n04146614 n04179913 n04285008 n04311004 n04356056 n04366367 n04398044 n04399382 n04465501
n04486054 n04487081 n04507155 n04562935 n04596742 n07614500 n07695742 n07715103 n07720875 n07734744
n07747607 n07749582 n07753592 n07768694 n07873807 n07920052 n09193705 n09246464 n09428293 n12267677
"""
TINY_IMAGENET = _TINY_IMAGENET.split()
TINY_TRAIN, TINY_TEST, TINY_SIDE = 160, 30, 32
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Chosen:
    """One image of a set: its class, its file, and what is said of it."""

    label: int
    suffix: str
    data: bytes
    about: dict[str, Any]


def cifar10(folder: Path) -> dict[str, list[Chosen]]:
    """Of each class the first 600 training images; as test images its test images, and training images up to 200."""
    classes: dict[str, list[list[Chosen]]] = {part: [[] for _ in CIFAR10] for part in ("official", "train", "rest")}
    for number, count in AT_HAND.items():
        name = f"data_batch_{number}" if number else "test_batch"
        pixels, labels, _ = cifar_batch((folder / name).read_bytes(), str(folder / name))
        for index, label in enumerate(labels[:count]):
            full = len(classes["train"][label]) == CIFAR10_TRAIN
            part = "official" if not number else "rest" if full else "train"
            about = {"label": CIFAR10[label], "origin": f"CIFAR-10 {name}[{index}]"}
            data = encoded(Image.fromarray(np.ascontiguousarray(pixels[index])), "WEBP", lossless=True)
            classes[part][label].append(Chosen(label, "webp", data, about))
    test = [(a + b)[:CIFAR10_TEST] for a, b in zip(classes["official"], classes["rest"], strict=True)]
    parts = {}
    for name, lists in (("train", classes["train"]), ("test", test)):
        parts[name] = [one for of_class in lists for one in of_class]
        random.Random(CIFAR10_ORDER[name]).shuffle(parts[name])
    return parts


def imagenette(folder: Path) -> dict[str, list[Chosen]]:
    """Random photographs of each class in colour, squeezed to 144 x 144."""
    parts: dict[str, list[Chosen]] = {"train": [], "test": []}
    for part, subfolder, count in (("train", "train", IMAGENETTE_TRAIN), ("test", "val", IMAGENETTE_TEST)):
        for label, (wnid, (index, name)) in enumerate(IMAGENETTE.items()):
            files = sorted((folder / subfolder / wnid).glob("*.JPEG"))
            about = {"label": name, "wnid": wnid, "imagenet_index": index}
            parts[part] += drawn(files, count, IMAGENETTE_SIDE, label, about, folder)
    return {part: shuffled(chosen, "imagenette", part) for part, chosen in parts.items()}


def tiny_imagenet(folder: Path) -> dict[str, list[Chosen]]:
    """Random photographs of the classes above in colour, at 32 x 32; files of that size as they are."""
    words = (line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    names = {wnid: names.split(",")[0] for wnid, names in words}
    rows = (line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines())
    val: dict[str, list[Path]] = {wnid: [] for wnid in TINY_IMAGENET}
    for name, wnid, *_ in rows:
        val.setdefault(wnid, []).append(folder / "val" / "images" / name)
    parts: dict[str, list[Chosen]] = {"train": [], "test": []}
    for label, wnid in enumerate(TINY_IMAGENET):
        about = {"label": names[wnid], "wnid": wnid}
        train = (folder / "train" / wnid / "images").glob("*.JPEG")
        for part, files, count in (("train", train, TINY_TRAIN), ("test", val[wnid], TINY_TEST)):
            parts[part] += drawn(sorted(files), count, TINY_SIDE, label, about, folder)
    return {part: shuffled(chosen, "tinyimagenet32", part) for part, chosen in parts.items()}


def drawn(
    files: list[Path], count: int, side: int, label: int, about: dict[str, Any], folder: Path
) -> Iterator[Chosen]:
    """`count` of the files that are in colour, in random order; files of this side to the byte, others resized."""
    left = count
    for index in numpy_rng(0, "make-data", about["wnid"], count).permutation(len(files)):
        path = files[index]
        with Image.open(path) as image:
            if image.mode != "RGB":
                continue
            small = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)
            data = path.read_bytes() if small is image else encoded(small, "JPEG", quality=JPEG_QUALITY)
        yield Chosen(label, "jpg", data, about | {"origin": str(path.relative_to(folder))})
        left -= 1
        if not left:
            return
    raise SystemExit(f"{folder}: {about['wnid']} has {count - left} images in colour; {count} are needed")


def shuffled(chosen: list[Chosen], name: str, part: str) -> list[Chosen]:
    """The same in an order that depends on nothing but the set."""
    return [chosen[index] for index in numpy_rng(0, "make-data-order", name, part).permutation(len(chosen))]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_set(folder: Path, stem: str, key: str, parts: dict[str, list[Chosen]], per_shard: int, ending: str) -> None:
    """FOLDER/STEM-train-000000ENDING and so on, and how many images they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in parts.items():
        for start in range(0, len(chosen), per_shard):
            path = folder / f"{stem}-{part}-{start // per_shard:06d}{ending}"
            with ShardWriter(path, compressed=ending.endswith(".gz")) as writer:
                for number, one in enumerate(chosen[start : start + per_shard], start):
                    writer.write(sample(f"{key}-{part}-{number:05d}", one))
        print(f"{folder}: {len(chosen):,} {part} images")


def sample(key: str, one: Chosen) -> Sample:
    """The members that a shard holds of one image."""
    about = json.dumps(one.about, separators=(",", ":"), ensure_ascii=False).encode()
    return Sample(key, {one.suffix: one.data, "cls": str(one.label).encode(), "json": about})


def main(argv: Iterable[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="data_batch_1 … data_batch_5 and test_batch")
    parser.add_argument("--imagenette", type=Path, metavar="FOLDER", help="train/ and val/, a folder for each class")
    parser.add_argument("--tiny-imagenet", type=Path, metavar="FOLDER", help="train/, val/ and words.txt")
    parser.add_argument("--output", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    options = parser.parse_args(None if argv is None else list(argv))
    if not (options.cifar10 or options.imagenette or options.tiny_imagenet):
        parser.error("nothing to do: name at least one of --cifar10, --imagenette, --tiny-imagenet")
    output: Path = options.output
    if options.cifar10:
        write_set(output / "cifar10", "cifar10", "c10", cifar10(options.cifar10), 1000, ".tar.gz")
    if options.imagenette:
        write_set(output / "imagenette", "imagenette144", "inette", imagenette(options.imagenette), 500, ".tar")
    if options.tiny_imagenet:
        made = tiny_imagenet(options.tiny_imagenet)
        write_set(output / "tinyimagenet32", "tinyimagenet32", "tin", made, 2000, ".tar.gz")


if __name__ == "__main__":
    main()
