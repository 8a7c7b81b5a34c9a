"""What the transaction adds to the work on pictures:  python tests/bench/bench_overhead.py [--rounds N] [--case WxH]

A real `Protector` without Ray, one thread, takes shards of bench_apply.py (photographs, local folder) to their commits.
In the same run these calls of it are timed where they happen:

hash     SHA-256 of the output, while it is written
commit   step 1 (is there a commit?) and step 5 (the record, create-if-absent with its flush to disk, quarantine)
metrics  report_shard, into the metrics of Ray (`RayRecorder`), as an actor in a cluster does; here nobody exports them

The bound check is part of the arithmetic (`add`) and not counted. `put`, the flush and renaming of the output itself,
is shown beside: whoever writes a shard pays for it. Shares are of all seconds inside the actor's call.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"

import torch
from bench_apply import CASES, Bench, Case
from ratio import where, write

import actors.protector
import pipeline.storage.streams
from actors.cluster.metrics import RayRecorder
from actors.protector import Protector

NEEDED = 0.05
PARTS = ("hash", "commit", "metrics")


class Spent(NamedTuple):
    """Of both clocks."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def plus(self, other: Spent) -> Spent:
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


class Clocks:
    """Seconds by part; a call inside another timed one is not counted twice."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, Spent] = defaultdict(Spent)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._inside = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call; what it takes is added to its part."""

        def work(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return call(*arguments, **named)
            self._inside = True
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                now = Spent(time.perf_counter() - wall, time.process_time() - cpu)
                self.spent[part], self._inside = self.spent[part].plus(now), False
                self.calls[part] += 1

        return work


class TimedHash:
    """hashlib's SHA-256 with a clock before and after each call."""

    def __init__(self, clocks: Clocks, digest: Any) -> None:
        self.update = clocks.timed("hash", digest.update)
        self.hexdigest = clocks.timed("hash", digest.hexdigest)


def clock_in(clocks: Clocks, protector: Protector) -> Callable[[], None]:
    """Put clocks around the calls of this protector; call the answer to take those of modules away again."""
    transaction = protector.transaction
    for step in ("committed", "_commit"):
        object.__setattr__(transaction, step, clocks.timed("commit", getattr(transaction, step)))  # it is frozen
    output: Any = transaction.output
    output.create = clocks.timed("commit", output.create)
    output.put_file = clocks.timed("put", output.put_file)
    file_class: Any = pipeline.storage.streams.HashedFile
    make, report = file_class.__init__, actors.protector.report_shard

    def make_timed(self: Any, path: Path) -> None:
        make(self, path)
        self.digest = TimedHash(clocks, self.digest)

    file_class.__init__ = make_timed
    actors.protector.report_shard = clocks.timed("metrics", report)

    def undo() -> None:
        file_class.__init__ = make
        actors.protector.report_shard = report

    return undo


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Shares of every part in one case."""
    folder = Path(tempfile.mkdtemp(prefix="bench-overhead-"))
    bench = Bench(folder, case)
    clocks = Clocks()
    bench.protector.metrics = RayRecorder()
    bench.ours(0)  # warm-up, without clocks: imports and the making of metrics are once for a process
    undo = clock_in(clocks, bench.protector)
    whole = Spent()
    try:
        for number in range(rounds):
            bench.prepare(number)
            wall, cpu = time.perf_counter(), time.process_time()
            bench.ours(number)
            whole = whole.plus(Spent(time.perf_counter() - wall, time.process_time() - cpu))
            bench.committed(number)
    finally:
        undo()
        shutil.rmtree(folder, ignore_errors=True)
    assert clocks.calls["metrics"] == rounds
    assert clocks.calls["commit"] == 3 * rounds
    assert clocks.calls["hash"] > rounds * case.per_shard
    images = rounds * case.per_shard
    parts = {
        name: {
            "us_per_image": 1e6 * spent.wall_s / images,
            "wall_share": spent.wall_s / whole.wall_s,
            "cpu_share": spent.cpu_s / whole.cpu_s,
        }
        for name, spent in clocks.spent.items()
    }
    overhead = {share: sum(parts[name][share] for name in PARTS) for share in ("wall_share", "cpu_share")}
    about = {"what": case.name, "images_per_shard": case.per_shard, "shards": rounds}
    return about | {"us_per_image": 1e6 * whole.wall_s / images, "parts": parts, "overhead": overhead}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="shards")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this size")
    given = parser.parse_args()
    torch.set_num_threads(1)
    origin = where()
    print(f"overhead: {origin['machine']}, {origin['cpus']} CPUs, load {origin['load']}, commit {origin['commit']}")
    rows = [measure(case, given.rounds) for case in CASES if given.case in (None, case.name)]
    for row in rows:
        print(f"  {row['what']} JPEG, {row['images_per_shard']} to a shard: {row['us_per_image']:.0f} us per image")
        for name, part in row["parts"].items():
            counted = "" if name in PARTS else "   (not counted)"
            shares = f"{part['wall_share']:6.2%} of wall   {part['cpu_share']:6.2%} of CPU"
            print(f"    {name:8} {part['us_per_image']:8.1f} us per image   {shares}{counted}")
        wall, cpu = row["overhead"]["wall_share"], row["overhead"]["cpu_share"]
        print(f"    overhead {wall:.2%} of wall, {cpu:.2%} of CPU; needed {NEEDED:.0%}")
    write("overhead", {"rows": rows, "needed": NEEDED})
    return 0 if all(row["overhead"]["wall_share"] <= NEEDED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
