"""Size of protected image files, and what they keep of deltas:  python tests/bench/bench_sizes.py [--protection FILE]

Every JPEG at hand (data/native, 100 of data/imagenette, photographs inside installed packages) is protected as a run
does it, with `--encode same` and as quality 95, 4:4:4, at epsilon 8/255 and 16/255, with grey and with coloured deltas;
what is left of each delta is measured on the file. A second table says from which quality on tables eat a delta.
--protection: sample-wise deltas of this fitted protection, instead of typical ones; all pictures in cluster 0.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from photo_shards import crops
from PIL import Image
from ratio import write

from pipeline.deltas.apply import LaidDeltas, close_sample
from pipeline.deltas.delta import LaidDelta, lay
from pipeline.deltas.load import load_cluster_protection
from pipeline.deltas.samplewise.base import DeltaMaker
from pipeline.deltas.samplewise.kinds import maker_of
from pipeline.deltas.survival import survival
from pipeline.errors import SampleError
from pipeline.measures.estimate import TypicalDeltas
from pipeline.pictures.jpeg import decode_pixels, encode_pixels, jpeg_header
from pipeline.pictures.members import open_sample
from pipeline.pictures.picture import Picture, squeezed, stored
from pipeline.records import Sample
from pipeline.settings import Settings

SIDE = 72  # of typical deltas, pixels
HOWS = ("same", "jpeg:95")
QUALITIES = (95, 90, 85, 80, 75, 70, 60, 50)
IMAGENETTE = 100
PER_SIZE = 12
Row = dict[str, Any]


def jpegs(data: Path) -> Iterator[tuple[str, Sample]]:
    """(collection, sample) of every JPEG at hand."""
    for name, limit in (("native", 1000), ("imagenette", IMAGENETTE)):
        found = 0
        for path in sorted((data / name).glob("*.tar")):
            with tarfile.open(path) as archive:
                for member in archive:
                    opened = archive.extractfile(member) if member.isfile() and found < limit else None
                    content = opened.read() if opened else b""
                    if content.startswith(b"\xff\xd8\xff"):
                        found += 1
                        yield name, Sample(member.name, {"jpg": content})
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.jp*g")):
        yield "packages", Sample(path.name, {"jpg": path.read_bytes()})


class Deltas:
    """Typical deltas, or those of a protection."""

    def __init__(self, epsilon: float, has_colour: bool, protection: Path | None) -> None:
        self.epsilon = epsilon
        self._typical = LaidDeltas(TypicalDeltas(epsilon, SIDE, has_colour=has_colour))
        self._maker: DeltaMaker | None = None
        if protection is not None:
            fitted = load_cluster_protection(protection.read_bytes())
            if fitted.sample is None:
                raise SystemExit(f"{protection} is not sample-wise")
            self._maker = maker_of(fitted.sample, fitted.targets, epsilon)
            self._side = fitted.sample.side

    def of(self, sample: Sample, picture: Picture) -> LaidDelta:
        """The delta of one picture, in its stored layout."""
        if self._maker is None:
            return self._typical.delta_for(0, sample.key, *picture.upright_size, picture.orientation)
        levels = self._maker.levels(squeezed(picture, self._side)[None], [0], [sample.key])
        return LaidDelta(stored(lay(levels[0], *picture.upright_size, self.epsilon), picture.orientation))


def collections(data: Path, levels: int, has_colour: bool, protection: Path | None) -> list[Row]:
    """One row per collection: medians over its files, and how many needed a finer coding."""
    deltas = Deltas(levels / 255, has_colour, protection)
    found: dict[str, list[dict[str, tuple[float, float, bool]]]] = {}
    for collection, sample in jpegs(data):
        try:
            opened = open_sample(sample, settings=Settings())
        except SampleError:
            continue
        laid, per_how = deltas.of(sample, opened.picture), {}
        for how in HOWS:
            done = close_sample(opened, laid, deltas.epsilon, settings=Settings(encode=how), reread=1.0)
            left = float("nan") if done.survival is None else done.survival
            per_how[how] = (done.output_image_bytes / done.input_image_bytes, left, done.is_finer)
        found.setdefault(collection, []).append(per_how)
    found["all"] = [one for files in found.values() for one in files]
    rows = []
    for collection, files in found.items():
        row: Row = {"epsilon": levels, "colour": has_colour, "files": collection, "n": len(files)}
        for how in HOWS:
            sizes, shares, finer = zip(*(one[how] for one in files), strict=True)
            row[how] = {
                "size": round(float(np.median(sizes)), 3),
                "survival": round(float(np.nanmedian(shares)), 4),
                "least_survival": round(float(np.nanmin(shares)), 4),
                "finer": sum(finer),
            }
        rows.append(row)
    return rows


def floors(levels: int, has_colour: bool) -> list[Row]:
    """Survival in a file of the source's own coding, by its size and quality (4:2:0): what is to be avoided."""
    deltas, rows = Deltas(levels / 255, has_colour, None), []
    for side in (64, 144, 400):
        pictures = [Image.fromarray(pixels) for pixels in crops(PER_SIZE, side, side)]
        for quality in QUALITIES:
            left, size, finer = [], [], 0
            for number, image in enumerate(pictures):
                file = io.BytesIO()
                image.save(file, "JPEG", quality=quality)
                sample = Sample(str(number), {"jpg": file.getvalue()})
                opened = open_sample(sample, settings=Settings())
                laid = deltas.of(sample, opened.picture)
                kept, own_bytes = _own(opened.picture, laid, deltas.epsilon)
                left.append(kept)
                size.append(own_bytes / len(file.getvalue()))
                finer += close_sample(opened, laid, deltas.epsilon, settings=Settings()).is_finer
            row = {"epsilon": levels, "colour": has_colour, "side": side, "quality": quality, "finer": finer}
            rows.append(row | {"size": round(float(np.median(size)), 3), "survival": round(float(np.median(left)), 4)})
    return rows


def _own(picture: Any, laid: LaidDelta, epsilon: float) -> tuple[float, int]:
    """Survival and bytes if the file's own coding is kept whatever it does to the delta."""
    changed, _ = laid.added_to(picture.pixels, epsilon)
    data = encode_pixels(changed, picture.coding)
    header = jpeg_header(data)
    decoded = None if header is None else decode_pixels(data, header)
    if decoded is None:
        raise SystemExit("a JPEG written here cannot be read back")
    return survival(picture.pixels, changed, decoded), len(data)


def webps(levels: int) -> list[Row]:
    """Lossy WebP files written as a run does it, and without loss: medians of size and survival, grey deltas."""
    deltas, rows = Deltas(levels / 255, False, None), []
    for side, quality in itertools.product((64, 144, 400), (75, 90)):
        found = []
        for number, pixels in enumerate(crops(PER_SIZE, side, side)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "WEBP", quality=quality)
            sample = Sample(str(number), {"webp": file.getvalue()})
            opened = open_sample(sample, settings=Settings())
            exact = replace(opened, picture=replace(opened.picture, is_lossy=False))
            laid = deltas.of(sample, opened.picture)
            ours, lossless = (
                close_sample(one, laid, deltas.epsilon, settings=Settings(), reread=1.0) for one in (opened, exact)
            )
            sizes = [done.output_image_bytes / done.input_image_bytes for done in (ours, lossless)]
            found.append((*sizes, ours.survival))
        table = np.array(found, dtype=np.float64)
        size, lossless_size, left = (round(float(value), 3) for value in np.median(table, axis=0))
        row: Row = {"epsilon": levels, "side": side, "quality": quality, "size": size, "survival": left}
        rows.append(row | {"lossless_size": lossless_size})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SCUMBLE_DATA", "data")))
    parser.add_argument("--protection", type=Path)
    options = parser.parse_args()
    rows, limits, lossy = [], [], []
    for levels in (8, 16):
        for has_colour in (False,) if options.protection else (False, True):
            rows += collections(options.data, levels, has_colour, options.protection)
            limits += [] if options.protection else floors(levels, has_colour)
        lossy += [] if options.protection else webps(levels)
    for row in rows:
        kind = "colour" if row["colour"] else "grey"
        print(f"epsilon {row['epsilon']:2} {kind:6} {row['files']:10} n {row['n']:4}", end="")
        for how in HOWS:
            one = row[how]
            print(f"   {how}: size {one['size']:.2f}, left {one['survival']:.3f}", end="")
            print(f" (least {one['least_survival']:.3f}), finer {one['finer']}", end="")
        print()
    for row in limits:
        kind = "colour" if row["colour"] else "grey"
        print(f"epsilon {row['epsilon']:2} {kind:6} side {row['side']:3} quality {row['quality']}: own coding", end="")
        print(f" leaves {row['survival']:.3f}, size {row['size']:.2f}; finer {row['finer']} of {PER_SIZE}")
    for row in lossy:
        print(f"epsilon {row['epsilon']:2} WebP   side {row['side']:3} quality {row['quality']}:", end="")
        print(f" size {row['size']:.2f}, left {row['survival']:.3f}; lossless size {row['lossless_size']:.2f}")
    write("sizes_fitted" if options.protection else "sizes", {"rows": rows, "own_coding": limits, "webp": lossy})


if __name__ == "__main__":
    main()
