"""Wheels for a GPU machine without a network: gathered here in parts, installed there where something is missing."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

WHEELS = Path(__file__).parent / "wheels"
PROJECT = "scumble"
PYTHON, PLATFORMS = "3.12", tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5))
TOOLS = ("pytest", "pytest-timeout")
IN_THE_IMAGE = ("torch", "torchvision", "pip", "setuptools")  # what else is there is not installed a second time
MIB = 1 << 20
PIECE = re.compile(r"(.+\.whl)\.piece-(\d+)")  # a wheel that is larger than a part, cut up


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(*names: str) -> set[str]:
    """The packages, and all that they ask for, as far as it is installed here."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    left = [Requirement(name) for name in names]
    seen: set[str] = set()
    while left:
        wanted = left.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        try:
            asked = metadata.requires(wanted.name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(canonical(wanted.name))
        for one in map(Requirement, asked):
            extras = ["", *wanted.extras]
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(one)
    return found


def gather(have: Path | None, part_bytes: int) -> None:
    """Download what the project needs and the machine lacks, and lay it out in parts."""
    there = set(map(canonical, have.read_text().split())) if have else set()
    wanted = closure(PROJECT, *TOOLS) - closure(*IN_THE_IMAGE) - there - {PROJECT}
    shutil.rmtree(WHEELS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        platforms = [part for platform in (*PLATFORMS, "manylinux2014_x86_64") for part in ("--platform", platform)]
        versions = [f"{name}=={metadata.version(name)}" for name in sorted(wanted)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*command, "--python-version", PYTHON, *platforms, *versions], check=True)
        files = sorted(Path(folder).iterdir(), key=lambda path: -path.stat().st_size)
        parts = lay_out(files, part_bytes)
    for number, size in enumerate(parts):
        print(f"{WHEELS / f'part-{number}'}: {size / MIB:.1f} MiB")


def lay_out(files: list[Path], part_bytes: int) -> list[int]:
    """Files, large ones first, each into the first part with room for it; the bytes of every part."""
    sizes: list[int] = []

    def put(name: str, data: bytes) -> None:
        part = next((number for number, size in enumerate(sizes) if size + len(data) <= part_bytes), len(sizes))
        if part == len(sizes):
            sizes.append(0)
        sizes[part] += len(data)
        (WHEELS / f"part-{part}").mkdir(parents=True, exist_ok=True)
        (WHEELS / f"part-{part}" / name).write_bytes(data)

    for path in files:
        data = path.read_bytes()
        if len(data) <= part_bytes:
            put(path.name, data)
            continue
        for number, start in enumerate(range(0, len(data), part_bytes)):
            put(f"{path.name}.piece-{number}", data[start : start + part_bytes])
    return sizes


def install(target: Path) -> None:
    """Join the pieces, then install into `target` whatever of it this Python does not have."""
    with tempfile.TemporaryDirectory() as folder:
        wheels = [path for path in joined(Path(folder)) if not is_here(path)]
        print(f"installing {', '.join(path.name.split('-')[0] for path in wheels) or 'nothing: all is there'}")
        if wheels:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            subprocess.run([*command, "--target", str(target), *map(str, wheels)], check=True)


def joined(folder: Path) -> list[Path]:
    """Every wheel, those that were cut up whole again in `folder`."""
    pieces: dict[str, dict[int, Path]] = {}
    found = []
    for path in sorted(WHEELS.glob("part-*/*")):
        if cut := PIECE.fullmatch(path.name):
            pieces.setdefault(cut[1], {})[int(cut[2])] = path
        elif path.suffix == ".whl":
            found.append(path)
    for name, parts in pieces.items():
        (folder / name).write_bytes(b"".join(parts[number].read_bytes() for number in range(len(parts))))
        found.append(folder / name)
    return found


def is_here(wheel: Path) -> bool:
    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    gathering = verbs.add_parser("gather")
    gathering.add_argument("--have", type=Path, help="a file of package names that the machine has already")
    gathering.add_argument("--part-mib", type=int, default=48, help="size of a part, at most 60")
    installing = verbs.add_parser("install")
    installing.add_argument("--target", type=Path, required=True)
    options = parser.parse_args()
    if options.verb == "gather":
        gather(options.have, min(options.part_mib, 60) * MIB)
    else:
        install(options.target)


if __name__ == "__main__":
    main()
