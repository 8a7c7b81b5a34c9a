"""How many CPUs and GPUs each worker gets: arithmetic over the resources of nodes, without Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import ClusterError

MANY = 1_000_000  # processes of an unbounded pool
_SLACK = 1e-9  # 1 / 0.1 is a little less than 10

Resources = Mapping[str, float]  # of a node, as Ray names them: "CPU", "GPU"


@dataclass(frozen=True)
class Workers:
    """How a stage is spread over processes, each with its CPUs (threads) and GPUs.

    count  processes to request at once
    most   processes that a pool may grow to as nodes join
    """

    count: int
    cpus: float
    gpus: float
    most: int = 0

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def on_cpus(self) -> Workers:
        """One process per CPU of these workers: for stages that need no GPU."""
        if not self.gpus:
            return self
        return Workers(int(self.count * self.cpus), 1.0, 0.0, int(self.most * self.cpus))


def place(nodes: Sequence[Resources], gpus: float, *, workers: int | None = None, grows: bool = False) -> Workers:
    """Processes of one size with `gpus` GPUs each: as many as fit, or `workers`, with as many CPUs as then fit.

    nodes    what each node has
    workers  requested processes; None: one per GPU share, or one per CPU
    grows    whether an autoscaler may add nodes: it looks at the processes that wait for one

    A CPU counts where a process can be placed, so a GPU process is never sized by a node without GPUs.
    Raises ClusterError if no node has room for one process and none will be added.
    """
    shapes = Counter(_shape(node) for node in nodes)
    possible = _fit(shapes, 1, gpus)
    if not possible and not grows:
        raise ClusterError(_refusal(shapes, gpus))
    wanted = min(workers or possible, possible)
    largest = int(max((cpus for cpus, _ in shapes), default=1))
    cpus = next((each for each in range(largest, 1, -1) if _fit(shapes, each, gpus) >= max(wanted, 1)), 1)
    count = max(1, workers or wanted) if grows else wanted
    return Workers(count, float(cpus), gpus, workers or MANY)


def check_memory(nodes: Sequence[Resources], each: int, workers: int, what: str) -> None:
    """Raise ClusterError if the nodes have no room for a copy of `each` bytes in every worker, and one for all.

    nodes  what each node has; nothing is judged where one does not say how much memory
    what   takes the memory, and what to do about it, for the message
    """
    memory = [node.get("memory", math.inf) for node in nodes]
    if each <= max(memory, default=0.0) and each * (workers + 1) <= sum(memory):
        return
    raise ClusterError(
        f"{what}: {each / 1e9:,.1f} GB in each of {workers} workers, and once for all; the nodes of the Ray cluster "
        f"have {sum(memory) / 1e9:,.1f} GB, the largest {max(memory, default=0.0) / 1e9:,.1f} GB"
    )


def _shape(node: Resources) -> tuple[float, float]:
    return node.get("CPU", 0.0), node.get("GPU", 0.0)


def _fit(shapes: Mapping[tuple[float, float], int], cpus: int, gpus: float) -> int:
    """How many processes of `cpus` and `gpus` fit; a share of a GPU is never split over two."""
    total = 0
    for (have_cpus, have_gpus), count in shapes.items():
        room = int(have_cpus // cpus)
        if gpus:
            shares = int(have_gpus) * int(1 / gpus + _SLACK) if gpus < 1 else int(have_gpus / gpus + _SLACK)
            room = min(room, shares)
        total += room * count
    return total


def _refusal(shapes: Mapping[tuple[float, float], int], gpus: float) -> str:
    asked = f"{gpus:g} GPU and a CPU (--gpus-per-worker {gpus:g})" if gpus else "a CPU"
    have = [f"{n} with {cpus:g} CPU, {have_gpus:g} GPU" for (cpus, have_gpus), n in sorted(shapes.items())]
    return f"no node of the Ray cluster has {asked} for a worker; its nodes: {'; '.join(have) or 'none'}"
