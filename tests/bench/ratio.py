"""Ratios that a busy machine does not decide: two ways of one job in turns (A B B A), in one process, after a warm-up.

Processor seconds of the process (all its threads) and wall seconds are both taken. A ratio is taken per round, of two
runs that follow each other; the median over the rounds counts, and the quartiles say how far to trust it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Work = Callable[[int], int]  # number of the round -> units of work that were done


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Timing:
    """One run."""

    units: int
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Row:
    """One comparison: ours against plain, units per second of either clock and their ratio (1 = as fast)."""

    what: str
    unit: str
    rounds: int
    ours_per_cpu_s: float
    plain_per_cpu_s: float
    ours_per_wall_s: float
    plain_per_wall_s: float
    cpu_ratio: Spread
    wall_ratio: Spread
    needed: float


def timed(work: Work, number: int) -> Timing:
    """Run once, between two readings of both clocks."""
    wall, cpu = time.perf_counter(), time.process_time()
    units = work(number)
    return Timing(units, time.process_time() - cpu, time.perf_counter() - wall)


def in_turns(ours: Work, plain: Work, rounds: int, wait: Callable[[], Any] = lambda: None) -> list[dict[str, Timing]]:
    """Timings of each round; the order is turned round by round, and the first round is thrown away.

    wait  called before every single run: a barrier, where several processes measure at once
    """
    taken: list[dict[str, Timing]] = []
    for number in range(rounds + 1):
        order = [("ours", ours), ("plain", plain)]
        timings = {}
        for name, work in order if number % 2 else reversed(order):
            wait()
            timings[name] = timed(work, number)
        taken.append(timings)
    return taken[1:]


def row(what: str, unit: str, taken: Sequence[Mapping[str, Timing]], needed: float) -> Row:
    """The rounds, of one process or of several, as one line of the table."""

    def rate(name: str, clock: str) -> float:
        return statistics.median(one[name].units / max(getattr(one[name], clock), 1e-9) for one in taken)

    def ratio(clock: str) -> Spread:
        pairs = [(one["ours"], one["plain"]) for one in taken]
        return Spread.of(
            [
                (ours.units / max(getattr(ours, clock), 1e-9)) / (plain.units / max(getattr(plain, clock), 1e-9))
                for ours, plain in pairs
            ]
        )

    return Row(
        what,
        unit,
        len(taken),
        rate("ours", "cpu_s"),
        rate("plain", "cpu_s"),
        rate("ours", "wall_s"),
        rate("plain", "wall_s"),
        ratio("cpu_s"),
        ratio("wall_s"),
        needed,
    )


def publish(
    name: str, rows: Sequence[Row], extra: Mapping[str, Any] | None = None, *, result: str | None = None
) -> None:
    """Print the table of bench_NAME.py and write results/NAME.json, or another one."""
    origin = where()
    print(f"{name}: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    print(f"  {' '.join(f'{package} {number}' for package, number in origin['versions'].items())}")
    print(f"  {'':44} {'ours':>9} {'plain':>9} {'unit per CPU s':>14}   ratio CPU [quartiles]   ratio wall [quartiles]")
    for one in rows:
        rates = f"{one.ours_per_cpu_s:9.1f} {one.plain_per_cpu_s:9.1f} {one.unit:>14}"
        print(f"  {one.what:44} {rates}   {one.cpu_ratio}    {one.wall_ratio}   needed {one.needed}, n {one.rounds}")
    write(result or name, {"rows": [asdict(one) for one in rows], **(extra or {})})


def write(name: str, found: Mapping[str, Any]) -> None:
    """results/NAME.json: where it was measured, and what."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {**where(), "command": command, **found}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def where() -> dict[str, Any]:
    """Machine, load, versions and commit: what a figure needs to be believed."""
    packages = ("torch", "pillow", "numpy", "ray", "timm")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": _processor(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
