"""What processes have of the machine's cores: seconds that they had, turns that they take, and a limit to them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

WINDOW_S = 10.0
PERIOD_US = 100_000  # as Kubernetes has it


def cpu_seconds(pid: int) -> float:
    """Of a process, all threads, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stolen_seconds() -> float:
    """CPU seconds that the host has withheld from this machine so far."""
    ticks = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    return ticks / os.sysconf("SC_CLK_TCK")


class Turns(threading.Thread):
    """Lets two workers work together and singly by turns, ten seconds each, from inside to outside of its `with`.

    workers  process ids of those that work, once they are there
    commits  time and images of each commit so far
    between  numbers of commits, from which on and until which there are windows
    head     processes whose CPU seconds are noted as well
    """

    def __init__(
        self,
        workers: Callable[[], list[int]],
        commits: Callable[[], list[tuple[float, int]]],
        between: tuple[int, int],
        head: Sequence[int] = (),
    ) -> None:
        super().__init__(daemon=True)
        self.workers, self.commits, self.between, self.head = workers, commits, between, head
        self.windows: list[dict[str, float]] = []
        self.over = threading.Event()
        self.found: list[tuple[float, int]] = []

    def __enter__(self) -> Turns:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        first, last = self.between
        pids: list[int] = []
        while len(pids) < 2 or len(self.found) < first:
            if self.over.wait(0.5):
                return
            pids, self.found = self.workers(), self.commits()
        for resting in itertools.cycle((None, 0, None, 1)):
            if self.over.is_set() or len(self.found) >= last:
                return
            window = self._window(pids, None if resting is None else pids[resting])
            if not self.over.is_set():  # or it was cut short
                self.windows.append(window)
            self.found = self.commits()

    def _window(self, pids: list[int], resting: int | None) -> dict[str, float]:
        if resting is not None:
            os.kill(resting, signal.SIGSTOP)
        try:
            before = self._reading(pids)
            self.over.wait(WINDOW_S)
            after = self._reading(pids)
        finally:
            if resting is not None:
                os.kill(resting, signal.SIGCONT)
        start, actors, head, stolen = before
        end = after[0]
        return {
            "working": len(pids) - (resting is not None),
            "start": start,
            "end": end,
            "actors_s": after[1] - actors,
            "head_s": after[2] - head,
            "stolen": (after[3] - stolen) / (end - start) / (os.cpu_count() or 1),
        }

    def _reading(self, pids: list[int]) -> tuple[float, float, float, float]:
        return time.time(), sum(map(cpu_seconds, pids)), sum(map(cpu_seconds, self.head)), stolen_seconds()

    def counted(self) -> list[dict[str, float]]:
        """The windows, each with the images that were committed in it."""
        return [
            window | {"images": sum(images for at, images in self.found if window["start"] < at <= window["end"])}
            for window in self.windows
        ]


class Quota:
    """A group of processes that together have no more than so many cores, as `limits.cpu` gives them to a pod.

    It is a control group (version 1) below that of this process, which needs the rights of root. It can be closed
    when its processes have ended.
    """

    def __init__(self, cores: float) -> None:
        own = {line.split(":")[1]: line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
        if "cpu" not in own:
            raise SystemExit("a limit of cores needs control groups of version 1, with the controller cpu on its own")
        self.above = Path("/sys/fs/cgroup/cpu", own["cpu"].lstrip("/"))
        self.group = self.above / f"nodes-{os.getpid()}-{time.monotonic_ns()}"
        self.group.mkdir()
        (self.group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (self.group / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """What this process starts meanwhile belongs to the group, with all that it starts in turn."""
        _join(self.group)
        try:
            yield
        finally:
            _join(self.above)

    def __enter__(self) -> Quota:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        until = time.monotonic() + 30
        while (self.group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.2)
        self.group.rmdir()


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
