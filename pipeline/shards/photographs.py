"""A small real collection without downloads: patches of photographs that ship with our dependencies.

Every photograph is divided into a grid of cells. Each cell belongs to either training or test, and a patch never leaves
its cell, so that no test pixel is ever seen in training. A patch's label is the photograph it was cut from.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image

from pipeline.hashing import canonical, numpy_rng
from pipeline.records import Sample
from pipeline.shards.tar import ShardWriter

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "china",
    "coffee",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "motorcycle",
    "retina",
    "rocket",
)
TRAIN_PER_PHOTOGRAPH = 100
TEST_PER_PHOTOGRAPH = 30
SAMPLES_PER_SHARD = 256
_CELL = 96  # approximate cell side in pixels; at most 5 x 5 cells per photograph
_LEAST_CROP = 0.5  # least patch side, as a share of the cell's shorter side


@dataclass(frozen=True)
class Patch:
    """A square cut from a photograph, before resizing."""

    photograph: str
    split: str  # "train" | "test"
    number: int  # within photograph and split
    x: int
    y: int
    side: int  # pixels of the photograph

    @property
    def key(self) -> str:
        return f"{self.photograph}-{self.split}-{self.number:04d}"


@dataclass(frozen=True)
class DemoCollection:
    """The location of the shards, and the classes: label i is the photograph `classes[i]`."""

    folder: Path
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    classes: tuple[str, ...]
    num_train: int
    num_test: int


@cache
def photograph(name: str) -> NDArray[np.uint8]:
    """One of PHOTOGRAPHS, uint8 [H, W, 3] or, if grey, [H, W]; read only from installed packages."""
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        pixels = skimage_data.stereo_motorcycle()[0]
    else:
        pixels = getattr(skimage_data, name)()
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def plan_patches(*, seed: int) -> list[Patch]:
    """All patches of the collection, the same for every side and on every machine.

    A photograph's patches are dealt in turn to the cells of their split; position and scale are random per patch.
    """
    return [
        _draw_patch(name, split, number, cells[number % len(cells)], seed)
        for name in PHOTOGRAPHS
        for split, count in (("train", TRAIN_PER_PHOTOGRAPH), ("test", TEST_PER_PHOTOGRAPH))
        for cells in [_cells(name, split)]
        for number in range(count)
    ]


def write_demo_collection(folder: Path, *, seed: int, side: int = 64) -> DemoCollection:
    """Write train-00000N.tar and test-00000N.tar to `folder`: 1,600 and 480 images of side x side pixels, 16 classes.

    Members of a sample: KEY.jpg (quality 95, 4:4:4) or KEY.png, chosen at random, grey if the photograph is;
    KEY.cls (label); KEY.json (photograph, x, y, side of the patch). The same seed and side give the same bytes. An
    existing identical shard is left alone, any other is replaced atomically. Raises OSError if `folder` is not
    writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    patches = plan_patches(seed=seed)
    written = {
        split: _write_split(folder, split, [patch for patch in patches if patch.split == split], seed, side)
        for split in ("train", "test")
    }
    counts = {split: sum(patch.split == split for patch in patches) for split in written}
    return DemoCollection(folder, written["train"], written["test"], PHOTOGRAPHS, counts["train"], counts["test"])


def train_squares(side: int, *, seed: int) -> NDArray[np.uint8]:
    """All training patches in colour, without compression losses: uint8 [1600, 3, side, side]."""
    patches = [patch for patch in plan_patches(seed=seed) if patch.split == "train"]
    squares = [np.asarray(_square(patch, side).convert("RGB")) for patch in patches]
    return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))


def _cells(name: str, split: str) -> list[tuple[int, int, int, int]]:
    """Cells (top, left, bottom, right) of a split: every fourth, in a knight's-move pattern, is test."""
    height, width = photograph(name).shape[:2]
    rows, columns = (max(2, min(5, length // _CELL)) for length in (height, width))
    tops = [height * row // rows for row in range(rows + 1)]
    lefts = [width * column // columns for column in range(columns + 1)]
    return [
        (tops[row], lefts[column], tops[row + 1], lefts[column + 1])
        for row in range(rows)
        for column in range(columns)
        if ((row + 2 * column) % 4 == 0) == (split == "test")
    ]


def _draw_patch(name: str, split: str, number: int, cell: tuple[int, int, int, int], seed: int) -> Patch:
    rng = numpy_rng(seed, "demo-patch", name, split, number)
    top, left, bottom, right = cell
    longest = min(bottom - top, right - left)
    side = int(rng.integers(int(longest * _LEAST_CROP), longest + 1))
    y = int(rng.integers(top, bottom - side + 1))
    x = int(rng.integers(left, right - side + 1))
    return Patch(name, split, number, x, y, side)


def _write_split(folder: Path, split: str, patches: list[Patch], seed: int, side: int) -> tuple[Path, ...]:
    order = numpy_rng(seed, "demo-order", split).permutation(len(patches))
    shuffled = [patches[index] for index in order]
    paths = []
    with TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for index, samples in enumerate(_chunks(shuffled)):
            path = folder / f"{split}-{index:06d}.tar"
            draft = Path(scratch) / path.name
            with ShardWriter(draft, compressed=False) as writer:
                for patch in samples:
                    writer.write(_sample(patch, seed, side))
            if not path.exists() or path.read_bytes() != draft.read_bytes():
                os.replace(draft, path)
            paths.append(path)
    return tuple(paths)


def _chunks(patches: list[Patch]) -> Iterator[list[Patch]]:
    for start in range(0, len(patches), SAMPLES_PER_SHARD):
        yield patches[start : start + SAMPLES_PER_SHARD]


def _square(patch: Patch, side: int) -> Image.Image:
    pixels = photograph(patch.photograph)[patch.y : patch.y + patch.side, patch.x : patch.x + patch.side]
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def _sample(patch: Patch, seed: int, side: int) -> Sample:
    image = _square(patch, side)
    file = io.BytesIO()
    is_jpeg = bool(numpy_rng(seed, "demo-format", patch.key).integers(2))
    if is_jpeg:
        image.save(file, "JPEG", quality=95, subsampling=0)
    else:
        image.save(file, "PNG")
    cut = {"photograph": patch.photograph, "x": patch.x, "y": patch.y, "side": patch.side}
    members = {
        "jpg" if is_jpeg else "png": file.getvalue(),
        "cls": str(PHOTOGRAPHS.index(patch.photograph)).encode(),
        "json": canonical(cut),
    }
    return Sample(patch.key, members)
