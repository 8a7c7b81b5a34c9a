"""One unit of new uploads: read, protected, written to the output, and described by the commit that makes it count.

1 read every object in the version that was listed; one that has changed is left for the next run
2 protect it, or record why not
3 write the protected objects, then the quarantine
4 the caller creates the commit; until then nothing in the unit counts, and all of it may be redone
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import layout
from pipeline.errors import InputError, Reason, StoreError
from pipeline.hashing import sha256
from pipeline.metrics import ShardCounts
from pipeline.records import Rejection, Sample, quarantine_to_bytes, shown
from pipeline.settings import ApplySettings
from pipeline.shards.names import content_type, output_name, sample_name
from pipeline.storage.store import Store
from pipeline.uploads.ledger import UnitCommit
from pipeline.uploads.segments import Row
from pipeline.uploads.units import Item, Unit

if TYPE_CHECKING:
    from pipeline.deltas.apply import ProtectedSample, ShardOutcome
    from pipeline.deltas.picture_deltas import ProtectedPicture
    from pipeline.uploads.deltas import UploadDeltas

BATCH_SIZE = 32


@dataclass(frozen=True)
class Places:
    """Where uploads come from and go, and the settings that decide their bytes."""

    source: Store
    output: Store
    settings: ApplySettings
    fingerprint: str


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit; `commit` has no rows if there is nothing to commit.

    moved    names that changed or disappeared in the meantime; left for the next run
    failed   (name, error) of objects the store failed to return
    refused  what was quarantined, including images inside shards
    seconds  step -> seconds of work, summed over threads
    elapsed  wall seconds
    finer    JPEGs coded more finely than they came
    is_down  True if the store kept failing for one of them despite retries
    """

    commit: UnitCommit
    moved: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    refused: tuple[Rejection, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    finer: int = 0
    is_down: bool = False

    @property
    def protected(self) -> int:
        return sum(row.protected for row in self.commit.rows)

    @property
    def quarantined(self) -> int:
        return sum(row.quarantined for row in self.commit.rows)

    @property
    def drifted(self) -> int:
        return sum(row.drifted for row in self.commit.rows)

    @property
    def counts(self) -> ShardCounts:
        """The metrics of the unit."""
        rows = self.commit.rows
        return ShardCounts(
            self.protected,
            Counter(rejection.reason.value for rejection in self.refused),
            bytes_in=sum(row.size for row in rows),
            bytes_out=sum(row.output_size for row in rows),
            seconds=self.seconds,
            elapsed=self.elapsed,
            assigned=self.protected,
            drifted=self.drifted,
        )


def protect_unit(unit: Unit, places: Places, deltas: UploadDeltas, *, threads: int) -> UnitResult:
    """Write a unit's protected objects and its quarantine; they count once the returned commit is created.

    Raises StoreError if the output cannot be written, PromiseError if a bound does not hold.
    """
    started = time.perf_counter()
    protect = _protect_shard if unit.is_shard and unit.items[0].fault is None else _protect_images
    outcome = protect(unit, places, deltas, threads)
    if outcome.refused:
        places.output.put(layout.upload_quarantine(unit.id), quarantine_to_bytes(outcome.refused))
    rows = tuple(sorted(outcome.rows, key=lambda row: row.name))
    return UnitResult(
        UnitCommit(unit.id, places.fingerprint, rows),
        tuple(outcome.moved),
        tuple(outcome.failed),
        tuple(outcome.refused),
        outcome.seconds(),
        time.perf_counter() - started,
        outcome.finer,
        outcome.is_down,
    )


@dataclass
class _Outcome:
    rows: list[Row] = field(default_factory=list)
    refused: list[Rejection] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    finer: int = 0
    is_down: bool = False
    spent: list[tuple[str, float]] = field(default_factory=list)  # step, seconds; threads append to it

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record how long the block takes."""
        started = time.perf_counter()
        yield
        self.spent.append((step, time.perf_counter() - started))

    def seconds(self) -> dict[str, float]:
        """Step -> total seconds."""
        summed: defaultdict[str, float] = defaultdict(float)
        for step, seconds in self.spent:
            summed[step] += seconds
        return dict(summed)

    def take(self, written: ShardOutcome) -> None:
        """Add what became of a shard's images."""
        self.refused += written.rejections
        self.spent += written.seconds.items()
        self.finer += written.num_finer

    def refuse(self, item: Item, rejection: Rejection) -> None:
        name = shown(item.name)
        reason, detail = rejection.reason.value, rejection.detail
        if item.version > 1:
            detail += "; if the output has a copy, it is of an earlier version"
        self.refused.append(Rejection(name, name, rejection.reason, detail))
        self.rows.append(_row(item, quarantined=1, reason=reason, detail=shown(detail)))


def _row(item: Item, **fields: object) -> Row:
    return Row(item.name, item.etag, item.version, item.size, item.kind, **fields)  # type: ignore[arg-type]


def _protect_images(unit: Unit, places: Places, deltas: UploadDeltas, threads: int) -> _Outcome:
    from pipeline.deltas.picture_deltas import protect_pictures

    outcome = _Outcome()
    given: list[Item] = []
    with ThreadPoolExecutor(threads) as pool:
        samples = _samples(unit, places, pool, given, outcome)
        results = protect_pictures(
            samples, deltas.deltas, settings=places.settings, batch_size=BATCH_SIZE, threads=threads
        )
        waiting = []
        for number, result in enumerate(results):
            item = given[number]
            if isinstance(result, Rejection):
                outcome.refuse(item, result)
            else:
                outcome.spent += result.done.seconds.items()
                outcome.finer += result.done.is_finer
                waiting.append((item, pool.submit(_put_image, item, result, places, deltas, outcome)))
        for item, putting in waiting:
            done = putting.result()
            if isinstance(done, Rejection):
                outcome.refuse(item, done)
            else:
                outcome.rows.append(done)
    return outcome


def _samples(
    unit: Unit, places: Places, pool: ThreadPoolExecutor, given: list[Item], outcome: _Outcome
) -> Iterator[Sample | Rejection]:
    """The readable objects of a unit, also appended to `given`; the others are recorded in `outcome`."""
    for item, sample in zip(unit.items, pool.map(lambda item: _read(item, places, outcome), unit.items), strict=True):
        if sample is None:
            outcome.moved.append(item.name)
        elif isinstance(sample, str):
            outcome.failed.append((item.name, sample))
        else:
            given.append(item)
            yield sample


def _read(item: Item, places: Places, outcome: _Outcome) -> Sample | Rejection | str | None:
    """The object as a sample, or why not (a Rejection or an error message); None if it has changed since."""
    key, suffix = sample_name(item.name)
    limit = places.settings.max_member_bytes
    if item.fault is not None:
        return Rejection(key, item.name, *item.fault)
    if item.size > limit:
        detail = f"{item.size:,} bytes exceed --max-member-bytes {limit:,}"
        return Rejection(key, item.name, Reason.TOO_LARGE, detail)
    try:
        with outcome.timed("read"):
            data = places.source.read_if(item.name, item.etag)
    except StoreError as error:
        outcome.is_down |= error.may_pass
        return str(error)
    return None if data is None else Sample(key, {suffix: data})


def _put_image(
    item: Item, picture: ProtectedPicture, places: Places, deltas: UploadDeltas, outcome: _Outcome
) -> Row | Rejection:
    (data,) = picture.done.sample.members.values()
    name = output_name(item.name, places.settings.encode)
    try:
        with outcome.timed("put"):
            places.output.put(name, data, content_type(name))
    except (InputError, FileExistsError):
        if not places.output.is_local:
            raise
        # unlike a folder, an object store may hold both `a` and `a/b`
        return Rejection(item.name, item.name, Reason.UNUSABLE_NAME, "a file in the output blocks this name's folder")
    return _row(
        item,
        output=name,
        output_size=len(data),
        output_sha256=sha256(data),
        cluster=picture.cluster,
        distance=picture.distance,
        protected=1,
        drifted=int(deltas.is_far(picture.cluster, picture.distance)),
    )


def _protect_shard(unit: Unit, places: Places, deltas: UploadDeltas, threads: int) -> _Outcome:
    from pipeline.deltas.apply import write_protected
    from pipeline.deltas.picture_deltas import protect_pictures
    from pipeline.shards.tar import ShardWriter, is_packed, read_samples

    (item,) = unit.items
    settings, outcome, far = places.settings, _Outcome(), list[bool]()

    def counted() -> Iterator[tuple[ProtectedSample, int] | Rejection]:
        samples = read_samples(stream, max_member_bytes=settings.max_member_bytes)
        for picture in protect_pictures(
            samples, deltas.deltas, settings=settings, batch_size=BATCH_SIZE, threads=threads
        ):
            if isinstance(picture, Rejection):
                yield picture
            else:
                far.append(deltas.is_far(picture.cluster, picture.distance))
                yield picture.done, picture.cluster

    with tempfile.TemporaryDirectory(prefix="scumble-") as scratch:
        path = Path(scratch) / "shard"
        try:
            with (
                places.source.open_version(item.name, item.etag) as stream,
                ShardWriter(path, compressed=is_packed(item.name)) as writer,
            ):
                written = write_protected(counted(), writer)
            now = places.source.info(item.name)
        except InputError:
            now = None
        except (StoreError, OSError) as error:
            outcome.failed.append((item.name, str(error)))
            outcome.is_down = isinstance(error, StoreError) and error.may_pass
            return outcome
        if now is None or now.etag != item.etag:
            outcome.moved.append(item.name)
            return outcome
        try:
            with outcome.timed("put"):
                places.output.put_file(item.name, path)
        except (InputError, FileExistsError):
            if not places.output.is_local:
                raise
            detail = "a file in the output blocks this name's folder"
            outcome.refuse(item, Rejection(item.name, item.name, Reason.UNUSABLE_NAME, detail))
            return outcome
    outcome.take(written)
    outcome.rows.append(
        _row(
            item,
            output=item.name,
            output_size=writer.size,
            output_sha256=writer.sha256,
            protected=written.num_protected,
            quarantined=written.num_quarantined,
            drifted=sum(far),
        )
    )
    return outcome
