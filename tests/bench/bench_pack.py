"""Packing many small files, beside GNU tar over the same:  python tests/bench/bench_pack.py [--files N] [--rounds N]

`plain` is `tar -cf` with the flush of its file to disk; ours is the whole command `pack.py`: its start, the plan, label
and JSON beside every image (three members where tar writes one), SHA-256, and the flushes of shards and commits. Twice:
with the contents of all files in the page cache, and with none of them there.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ratio import Timing, publish, row

ROOT = Path(__file__).parents[2]
NEEDED = 0.9


def write_files(folder: Path, count: int) -> None:
    """Files of 2 to 3.5 kB that do not compress, a thousand to a folder."""
    rng = random.Random(0)
    for number in range(count):
        path = folder / f"class-{number // 1000:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff" + rng.randbytes(rng.randrange(2000, 3500)))


def forget(folder: Path) -> None:
    """Drop the contents of all files from the page cache; what is known of folders stays."""
    os.sync()
    for path in folder.rglob("*.jpg"):
        opened = os.open(path, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def took(command: Sequence[str], count: int) -> Timing:
    """Run a command to its end; CPU seconds are those of the process and its children."""
    wall, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Timing(count, cpu, time.perf_counter() - wall)


def in_rounds(
    source: Path, output: Path, count: int, rounds: int, ready: Callable[[Path], None]
) -> list[dict[str, Timing]]:
    """Timings of both ways, in turns; the first round is thrown away."""
    plain = ["sh", "-c", 'tar -cf "$1/all.tar" -C "$0" . && sync "$1/all.tar"', str(source), str(output)]
    ours = [sys.executable, str(ROOT / "jobs/pack.py"), "--input", str(source), "--output", str(output)]
    taken = []
    for number in range(rounds + 1):
        timings = {}
        for name, command in [("ours", ours), ("plain", plain)][:: 1 if number % 2 else -1]:
            output.mkdir()
            ready(source)
            timings[name] = took(command, count)
            shutil.rmtree(output)
        taken.append(timings)
    return taken[1:]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, metavar="N", help="files to pack")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="rounds that count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "files", Path(folder) / "out"
        write_files(source, options.files)
        rows = [
            row(
                f"{what}, {options.files:,} files",
                "files",
                in_rounds(source, output, options.files, options.rounds, ready),
                NEEDED,
            )
            for what, ready in (("cached", lambda _: None), ("not cached", forget))
        ]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"  peak memory of a process: {peak:,.0f} MB")
    publish("pack", rows, {"peak_mb": round(peak)})


if __name__ == "__main__":
    main()
