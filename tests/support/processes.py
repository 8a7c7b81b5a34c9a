"""Processes below others, and an end to them; needs nothing but /proc."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def descendants(*ancestors: int) -> list[int]:
    """Process ids below the given ones, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found: list[int] = []
    wave = list(ancestors)
    while wave:
        wave = [pid for pid, owner in parents.items() if owner in wave]
        found += wave
    return found


def named(processes: list[int], words: str) -> list[int]:
    """Those whose command line holds `words`, such as ray::MapWorker(MapBatches(Protector))."""
    found = []
    for pid in processes:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line:
            found.append(pid)
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
