"""What a run over new uploads did: counted while it goes on, shown to people, written for machines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.records import losses_of
from pipeline.uploads.listing import Tally
from pipeline.uploads.names import shown
from pipeline.uploads.transaction import UnitResult

_SHOWN = 20
_ENOUGH = 20  # images: a share of fewer says nothing


@dataclass
class Summary:
    """Counts of one run. `protected` and `quarantined` are images, those inside of shards included."""

    tally: Tally = field(default_factory=Tally)
    protected: int = 0
    quarantined: int = 0
    drifted: int = 0  # protected, but beyond the training's p99 of their cluster
    units: int = 0
    moved: int = 0  # replaced or gone while they were read
    num_failed: int = 0  # not given by the store
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, error of the first
    lost: list[str] = field(default_factory=list)  # parts of shards that could not be read
    started: float = field(default_factory=time.monotonic)

    def add(self, result: UnitResult) -> None:
        """Count a unit whose commit stands."""
        self.units += bool(result.commit.rows)
        self.protected += result.protected
        self.quarantined += result.quarantined
        self.drifted += result.drifted
        self.moved += len(result.moved)
        self.num_failed += len(result.failed)
        self.failed += [(shown(name), error) for name, error in result.failed[: _SHOWN - len(self.failed)]]
        self.lost += losses_of(shown(result.commit.rows[0].name), result.refused) if result.commit.rows else []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.protected / max(self.seconds, 1e-9)

    @property
    def drift_share(self) -> float:
        return self.drifted / max(1, self.protected)

    @property
    def quarantine_share(self) -> float:
        return self.quarantined / max(1, self.protected + self.quarantined)

    def drifts(self, max_share: float) -> bool:
        """True if more images than `max_share` are unlike what was fitted; never for fewer than 20."""
        return self.protected >= _ENOUGH and self.drift_share > max_share

    def to_json(self) -> dict[str, Any]:
        """All counts, by name."""
        tally = vars(self.tally) | {"unsettled": self.tally.unsettled + self.moved}
        return tally | {
            "listed": self.tally.listed,
            "protected": self.protected,
            "quarantined": self.quarantined,
            "units": self.units,
            "failed": self.num_failed,
            "failed_names": [name for name, _ in self.failed],
            "lost": self.lost[:_SHOWN],
            "drifted": self.drifted,
            "drift_share": round(self.drift_share, 4),
            "seconds": round(self.seconds, 3),
            "rate": round(self.rate, 2),
        }

    def lines(self) -> list[str]:
        """For people: one line of what was found, one of what was done."""
        tally = self.tally
        found = [f"{tally.new:,} new", f"{tally.changed:,} changed", f"{tally.known:,} done before"]
        found += [f"{tally.unsettled + self.moved:,} not settled yet", f"{tally.skipped:,} skipped (no images)"]
        lines = [f"found        {', '.join(found)}"]
        if tally.deleted:
            names = ", ".join(tally.deleted_names[:3]) + (", …" if tally.deleted > 3 else "")
            lines.append(f"deleted      {tally.deleted:,} left the input, their protected copies are kept: {names}")
        done = f"{self.protected:,} images in {self.units:,} units, {self.seconds:.1f} s, {self.rate:.1f} images/s"
        lines += [f"protected    {done}", f"quarantined  {self.quarantined:,} images"]
        if self.protected:
            lines.append(f"drift        {self.drift_share:.1%} beyond the training's p99 (1 % is expected)")
        return lines
