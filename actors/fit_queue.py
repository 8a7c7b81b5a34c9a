"""Ray actor that leases fits to workers: who fits what, and how far along it is.

It runs next to the driver, where memory is scarce: nothing here may import torch.
"""

from __future__ import annotations

from actors.cluster.failures import Failure
from actors.cluster.metrics import recorder
from pipeline.metrics import RESTARTED


class FitQueue:
    """Every fit has at most one worker; a dead worker loses its leases."""

    def __init__(self, units: list[str]) -> None:
        self._free = list(units)
        self._leases: dict[str, str] = {}  # unit -> worker
        self._progress = dict.fromkeys(units, 0.0)
        self._group = ""
        self._failure: Failure | None = None
        self._metrics = recorder()

    def take(self, worker: str, group: str) -> str | None:
        """The next unit for a worker, or None. A new worker group means that the previous one is dead."""
        if self._group not in ("", group):
            self._metrics.record(RESTARTED, 1, stage="fit")
        self._group = group
        for unit, owner in list(self._leases.items()):
            if not owner.startswith(group):
                del self._leases[unit]
                self._free.insert(0, unit)
        if not self._free or self._failure is not None:
            return None
        unit = self._free.pop(0)
        self._leases[unit] = f"{group}/{worker}"
        return unit

    def tell(self, unit: str, share: float) -> None:
        """The progress of a unit, from 0 to 1; 1 ends its lease."""
        self._progress[unit] = share
        if share >= 1:
            self._leases.pop(unit, None)

    def fail(self, failure: Failure) -> None:
        """What no other worker will do better: nothing more is given out. The first one counts."""
        self._failure = self._failure or failure

    def failure(self) -> Failure | None:
        return self._failure

    def progress(self) -> dict[str, float]:
        return dict(self._progress)
