"""Ray actor that leases fits to workers: who fits what, and how far it is.

It lives beside the driver, where memory is dear: nothing here may import torch.
"""

from __future__ import annotations

from actors.cluster.metrics import recorder
from pipeline.metrics import RESTARTED


class FitQueue:
    """Every fit has at most one worker; a worker that died loses its leases."""

    def __init__(self, units: list[str]) -> None:
        self._free = list(units)
        self._leases: dict[str, str] = {}  # unit -> worker
        self._progress = dict.fromkeys(units, 0.0)
        self._group = ""
        self._metrics = recorder()

    def take(self, worker: str, group: str) -> str | None:
        """The next unit for a worker, or None. A new worker group means that the one before is dead."""
        if self._group not in ("", group):
            self._metrics.record(RESTARTED, 1, stage="fit")
        self._group = group
        for unit, owner in list(self._leases.items()):
            if not owner.startswith(group):
                del self._leases[unit]
                self._free.insert(0, unit)
        if not self._free:
            return None
        unit = self._free.pop(0)
        self._leases[unit] = f"{group}/{worker}"
        return unit

    def tell(self, unit: str, share: float) -> None:
        """How far a unit is, 0 … 1; 1 ends its lease."""
        self._progress[unit] = share
        if share >= 1:
            self._leases.pop(unit, None)

    def progress(self) -> dict[str, float]:
        return dict(self._progress)
