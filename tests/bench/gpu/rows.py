"""What a step of the GPU command is told, and how it writes figures that outlive it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "tests" / "bench"  # what the benchmarks share


@dataclass(frozen=True)
class Task:
    """What a step is told.

    device  "cuda", or "cpu" in a rehearsal
    tiny    a rehearsal: everything as small as it may be
    work    a folder of its own
    rows    file that its figures go to, one JSON object a line
    data    folder of real data sets, which may be missing
    cpus    to be used
    """

    device: str
    tiny: bool
    work: Path
    rows: Path
    data: Path
    cpus: int

    @property
    def gpu_options(self) -> list[str]:
        """For a job: one worker with the whole GPU; in a rehearsal, CPUs."""
        return ["--gpus-per-worker", "1"] if self.device == "cuda" else []

    def row(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Write a figure down, at once."""
        kept = round(value, 4) if isinstance(value, float) else value
        with self.rows.open("a") as file:
            file.write(json.dumps({"what": what, "value": kept, "unit": unit, "note": note}) + "\n")
        print(f"{what}: {kept} {unit} {note}", flush=True)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.row(what, time.monotonic() - started, "s")


def told() -> Task:
    """The task of this step, from its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpus", type=int, required=True)
    for name in ("work", "rows", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return Task(**vars(parser.parse_args()))


def job(name: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *options]


def run(command: list[str], *, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command to its end, its output in this step's log too; what it printed. SystemExit if it fails."""
    print("$", *command[1:], flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode not in codes:
        raise SystemExit(f"{Path(command[1]).name} ended with {done.returncode}: {done.stdout.strip()[-300:]}")
    return done.stdout


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
