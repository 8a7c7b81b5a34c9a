"""What a run over new uploads did: counted as it goes, printed for people, written for machines."""

from __future__ import annotations

import calendar
import time
from dataclasses import dataclass, field

from pipeline.json_record import JsonRecord
from pipeline.records import losses_of, shown
from pipeline.uploads.listing import Tally
from pipeline.uploads.transaction import UnitResult

_UTC = "%Y-%m-%dT%H:%M:%SZ"
_SHOWN = 20
_ENOUGH = 20  # images: shares of fewer are meaningless


@dataclass(frozen=True)
class LastRun(JsonRecord):
    """last-run.json: how the last run ended, and its counts. Of object names, only the first few are listed.

    state   done | stopped | failed
    status  the same as `state`
    ended   UTC, by the clock of the machine that ran
    lost    parts of shards that could not be read
    rate    images per second
    finer   JPEGs coded more finely than they came
    """

    state: str
    status: str
    ended: str
    exit_code: int
    listed: int
    known: int
    new: int
    changed: int
    unsettled: int
    skipped: int
    deleted: int
    deleted_names: tuple[str, ...]
    protected: int
    quarantined: int
    units: int
    failed: int
    failed_names: tuple[str, ...]
    lost: tuple[str, ...]
    drifted: int
    drift_share: float
    seconds: float
    rate: float
    message: str | None = None
    finer: int = 0

    @property
    def ended_s(self) -> float:
        """The end of the second in which it ended, in seconds since 1970."""
        return calendar.timegm(time.strptime(self.ended, _UTC)) + 1.0


@dataclass
class Summary:
    """Counts of one run. `protected` and `quarantined` count images, including those inside shards."""

    tally: Tally = field(default_factory=Tally)
    protected: int = 0
    quarantined: int = 0
    drifted: int = 0  # protected, but beyond their cluster's fitted p99
    finer: int = 0  # JPEGs coded more finely than they came
    units: int = 0
    moved: int = 0  # replaced or deleted while being read
    num_failed: int = 0  # the store failed to return them
    failed: list[tuple[str, str]] = field(default_factory=list)  # name and error of the first few
    lost: list[str] = field(default_factory=list)  # parts of shards that could not be read
    started: float = field(default_factory=time.monotonic)

    def add(self, result: UnitResult) -> None:
        """Count a committed unit."""
        self.units += bool(result.commit.rows)
        self.protected += result.protected
        self.quarantined += result.quarantined
        self.drifted += result.drifted
        self.finer += result.finer
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
        """True if more than `max_share` of the images are unlike what was fitted; never for fewer than 20 images."""
        return self.protected >= _ENOUGH and self.drift_share > max_share

    def record(self, state: str, exit_code: int, message: str | None = None) -> LastRun:
        """The counts so far, as the record of a run that ends now."""
        tally = self.tally
        return LastRun(
            state=state,
            status=state,
            ended=time.strftime(_UTC, time.gmtime()),
            exit_code=exit_code,
            message=message,
            listed=tally.listed,
            known=tally.known,
            new=tally.new,
            changed=tally.changed,
            unsettled=tally.unsettled + self.moved,
            skipped=tally.skipped,
            deleted=tally.deleted,
            deleted_names=tuple(tally.deleted_names),
            protected=self.protected,
            quarantined=self.quarantined,
            units=self.units,
            failed=self.num_failed,
            failed_names=tuple(name for name, _ in self.failed),
            lost=tuple(self.lost[:_SHOWN]),
            drifted=self.drifted,
            finer=self.finer,
            drift_share=round(self.drift_share, 4),
            seconds=round(self.seconds, 3),
            rate=round(self.rate, 2),
        )

    def lines(self) -> list[str]:
        """Lines for people: what was found and what was done."""
        tally = self.tally
        counts = [f"{tally.new:,} new", f"{tally.changed:,} changed", f"{tally.known:,} already done"]
        counts += [f"{tally.unsettled + self.moved:,} not settled yet", f"{tally.skipped:,} skipped (not images)"]
        lines = [f"found        {', '.join(counts)}"]
        if tally.deleted:
            names = ", ".join(tally.deleted_names[:3]) + (", …" if tally.deleted > 3 else "")
            lines.append(f"deleted      {tally.deleted:,} deleted from the input; protected copies are kept: {names}")
        done = f"{self.protected:,} images in {self.units:,} units, {self.seconds:.1f} s, {self.rate:.1f} images/s"
        lines += [f"protected    {done}", f"quarantined  {self.quarantined:,} images"]
        if self.protected:
            lines.append(f"drift        {self.drift_share:.1%} beyond the fitted p99 (1 % is expected)")
        return lines
