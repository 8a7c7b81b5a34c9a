"""A run that is killed again and again, at points that are named and at times that a seed draws, until it is done."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from urllib.parse import quote

from tests.support import runs

POINTS = Path(__file__).parent / "points"
EMBEDDER, PROTECTOR = "ray::MapWorker(MapBatches(Embedder))", "ray::MapWorker(MapBatches(Protector))"
READER, TRAINER, DRIVER = "ray::MapWorker(MapBatches(FitImageReader))", "ray::RayTrainWorker", "driver"
STARTS = 12
SECONDS = 500


@dataclass
class Campaign:
    """One output, started until it is done.

    named   points at which whoever reaches them first dies, once each
    random  (role, seconds) of kills: a process of that role dies so long after it was first seen
    landed  what was killed, in order
    """

    source: Path
    output: Path
    tokens: Path
    named: tuple[str, ...]
    random: list[tuple[str, float]]
    options: tuple[str, ...] = ()
    landed: list[str] = field(default_factory=list)
    starts: int = 0

    def run(self) -> None:
        """Start the job until it ends well. Raises AssertionError if it fails without having been killed."""
        self.tokens.mkdir()
        for point in self.named:
            (self.tokens / quote(point, safe=" ")).touch()
        while True:
            self.starts += 1
            assert self.starts <= STARTS, f"not done after {STARTS} starts; killed so far: {self.landed}"
            before = len(self.landed) + self._spent()
            code, errors = self._one_start()
            if code == 0:
                break
            assert len(self.landed) + self._spent() > before, f"ended with {code} though nobody killed it: {errors}"
        self.landed += [f"at {path.name.removesuffix('.spent')}" for path in sorted(self.tokens.glob("*.spent"))]

    @property
    def left(self) -> list[str]:
        """Points that nobody has reached."""
        return sorted(path.name for path in self.tokens.iterdir() if not path.name.endswith(".spent"))

    def _spent(self) -> int:
        return len(list(self.tokens.glob("*.spent")))

    def _one_start(self) -> tuple[int, str]:
        path = os.pathsep.join([str(POINTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        log = self.tokens.parent / f"start-{self.starts}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                runs.command(str(self.source), str(self.output), *runs.small(*self.options)),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path, "KILL_TOKENS": str(self.tokens)},
            )
            family = Family(process)
            self._disturb(process, family)
        family.bury()
        return process.wait(), log.read_text()[-2000:]

    def _disturb(self, process: subprocess.Popen[bytes], family: Family) -> None:
        """Watch until the driver is gone; kill what is due."""
        until = time.monotonic() + SECONDS
        seen: dict[str, float] = {DRIVER: time.monotonic()}
        while process.poll() is None:
            if time.monotonic() > until:
                family.bury()
                raise AssertionError(f"a start took more than {SECONDS} s; killed so far: {self.landed}")
            looked = time.monotonic()
            family.look()
            for role, delay in list(self.random):
                found = [process.pid] if role == DRIVER else runs.named(family.living(), role)
                if found:
                    seen.setdefault(role, time.monotonic())
                if found and time.monotonic() - seen[role] > delay:
                    self.random.remove((role, delay))
                    self.landed.append(f"{role} after {delay:.1f} s")
                    runs.kill(found[0])
            time.sleep(max(0.05, 9 * (time.monotonic() - looked)))


class Family:
    """A process and all that it has started, known by pid and start time; Ray's daemons outlive a driver's death."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._seen = {process.pid: born(process.pid)}

    def look(self) -> None:
        """Note who is there now."""
        for pid in runs.descendants(self._process.pid, *self.living()):
            self._seen.setdefault(pid, born(pid))

    def living(self) -> list[int]:
        return [pid for pid, since in self._seen.items() if since and born(pid) == since]

    def bury(self) -> None:
        """SIGKILL whoever is left."""
        for _ in range(20):
            for pid in self.living():
                runs.kill(pid)
            if not self.living():
                break
            time.sleep(0.1)
        self._process.wait()


def born(pid: int) -> str:
    """Start time of a process in clock ticks, "" if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def spread(seed: int, roles: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """(role, delay): one kill for each, at a time within so many seconds of the role's first sight."""
    rng = Random(seed)
    return [(role, rng.uniform(0.0, longest)) for role, longest in roles]


def deal(points: Iterable[str], parts: int, part: int) -> tuple[str, ...]:
    """Every so-many-th of the points, so that each campaign has some of every stage and all together have all."""
    return tuple(points)[part::parts]


def job(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(runs.ROOT / "jobs" / name), *options], capture_output=True, text=True, check=False
    )
