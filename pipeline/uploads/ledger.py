"""What was done with every object: the union of unit commits, compacted into segments that are sorted by name.

A unit's commit is created if absent; that makes it count. `compact` writes commits into a segment, names it in the
manifest by compare-and-swap, and only then deletes them; segments of like size are merged, so that there are few and
each row is rewritten a few times in all. A row that is found twice counts once: the latest version of a name wins.
Whoever reads takes the commits first, then the manifest: what moved from one to the other meanwhile is seen twice.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from pipeline import layout
from pipeline.errors import ConflictError
from pipeline.json_record import CompactRecord
from pipeline.storage.store import Store
from pipeline.uploads.listing import Known
from pipeline.uploads.segments import (
    Row,
    Segment,
    Values,
    merged,
    merged_known,
    read_known,
    read_values,
    values_of,
    write_segment,
)

FORMAT = 1
_COMMITS_AT_ONCE = 200  # held in memory while they are compacted
_LIKE = 4  # a segment up to so many times as large is merged with what follows it
_READERS = 16
_TRIES = 3
_L = TypeVar("_L", bound="_LedgerRecord")


class _LedgerRecord(CompactRecord):
    """A record that says of which format it is; of another, it is refused before its fields are looked at."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "format": FORMAT}

    @classmethod
    def from_json(cls: type[_L], value: Any) -> _L:
        if not isinstance(value, dict):
            return super().from_json(value)
        rest = dict(value)
        found = json.dumps(rest.pop("format", None))
        if found != str(FORMAT):
            raise ValueError(f"format is {found[:40]}, this version reads {FORMAT}")
        return super().from_json(rest)


@dataclass(frozen=True)
class UnitCommit(_LedgerRecord):
    """What a unit's commit holds; it has no times, so that two who did the same wrote the same."""

    unit: str
    fingerprint: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Manifest(_LedgerRecord):
    """ledger.json: the segments that count, oldest and largest first.

    retired  names of those that the last compaction replaced; they are not deleted yet
    """

    segments: tuple[Segment, ...]
    retired: tuple[str, ...]

    cure = "restore it; without it, everything is protected again"


class Ledger:
    """The ledger below an output."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def known(self) -> Iterator[Known]:
        """(name, etag, version) of every object that was done, sorted by name; holds some blocks of rows."""
        commits, manifest = self._read(self._pending())
        pending = sorted(((row.name, row.etag, row.version) for row in _rows(commits)), key=lambda one: one[0])
        with contextlib.ExitStack() as stack:
            parts = [read_known(*self._open(one, stack)) for one in manifest.segments]
            yield from merged_known([*parts, iter(pending)] if pending or not parts else parts)

    def rows(self) -> Iterator[Row]:
        """All that is known of every object, sorted by name."""
        commits, manifest = self._read(self._pending())
        with contextlib.ExitStack() as stack:
            parts = [read_values(*self._open(one, stack)) for one in manifest.segments]
            for values in merged([*parts, iter(_sorted(commits))]):
                yield Row(*values)

    def manifest(self) -> Manifest:
        """The segments that count now. Raises InputError if the ledger's file is damaged, or of another version."""
        return self._look()[0]

    def _look(self) -> tuple[Manifest, str | None]:
        """The manifest, and the etag of the object it was read from; None if there is none."""
        seen = self._store.look(layout.UPLOADS_LEDGER)
        if seen is None:
            return Manifest((), ()), None
        return Manifest.from_bytes(seen.data, f"{self._store.url}/{layout.UPLOADS_LEDGER}"), seen.etag

    def commit(self, commit: UnitCommit) -> None:
        """Make a unit count. Raises ConflictError if somebody committed the same unit with other bytes.

        What only one of the two could read is left to the commit that stands. Raises InputError if that is damaged.
        """
        name = layout.upload_commit(commit.unit)
        if self._store.create(name, commit.to_bytes()):
            return
        found = UnitCommit.read(self._store, name)
        theirs = {row.name: row for row in found.rows} if found else {}  # compacted: whoever did it has seen it
        for ours in commit.rows:
            other = theirs.get(ours.name, ours)
            if not ours.agrees_with(other):
                raise ConflictError(
                    f"{ours.name}: committed with SHA-256 {other.output_sha256[:16]}, made here with "
                    f"{ours.output_sha256[:16]}: two runs disagree; compare library versions of their machines"
                )

    def compact(self, *, merge: bool, before: Callable[[], None] = lambda: None) -> None:
        """Write what is committed into segments, in parts of bounded memory; nothing is read twice afterwards.

        merge   merge segments of like size too. What they replace is deleted by the next compaction that merges, so
                that whoever reads now may finish.
        before  called before anything that others see is replaced or deleted; raises to stop
        """
        names = self._pending()
        while names:
            some, names = names[:_COMMITS_AT_ONCE], names[_COMMITS_AT_ONCE:]
            commits, _ = self._read(some, again=False)
            segment = self._write(iter(_sorted(commits)))
            before()
            self._swap(lambda old, new=segment: Manifest((*old.segments, new), old.retired))  # type: ignore[misc]
            self._store.delete(some)
        if merge:
            self._merge(before)

    def _merge(self, before: Callable[[], None]) -> None:
        manifest, etag = self._look()
        count = _mergeable([one.rows for one in manifest.segments])
        if count < 2:
            return
        stale = {*manifest.retired, *self._orphans(manifest)}
        kept, parts = manifest.segments[:-count], manifest.segments[-count:]
        with contextlib.ExitStack() as stack:
            rows = merged([read_values(*self._open(one, stack)) for one in parts])
            segment = self._write(rows)
        before()
        retired = tuple(one.name for one in parts)
        self._put(Manifest((*kept, segment), retired), etag)
        self._store.delete(layout.upload_segment(name) for name in sorted(stale))

    def _orphans(self, manifest: Manifest) -> set[str]:
        """Segments that no manifest names: a compaction died before its swap, or will fail at it."""
        prefix, ending = f"{layout.UPLOADS_SEGMENTS}/", ".parquet"
        there = {name[len(prefix) : -len(ending)] for name in self._store.names(layout.UPLOADS_SEGMENTS)}
        return there - {one.name for one in manifest.segments} - set(manifest.retired)

    def _write(self, rows: Iterator[Values]) -> Segment:
        name = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="scumble-") as scratch:
            path = Path(scratch) / "segment"
            segment = write_segment(rows, path, name)
            self._store.put_file(layout.upload_segment(name), path)
        return segment

    def _swap(self, changed: Callable[[Manifest], Manifest]) -> None:
        for attempt in range(_TRIES):
            old, etag = self._look()
            try:
                self._put(changed(old), etag)
                return
            except ConflictError:
                if attempt == _TRIES - 1:
                    raise

    def _put(self, manifest: Manifest, etag: str | None) -> None:
        """etag  of the version that is replaced; None if there is none."""
        data = manifest.to_bytes()
        if etag is None:
            done = self._store.create(layout.UPLOADS_LEDGER, data)
        else:
            done = self._store.replace_if(layout.UPLOADS_LEDGER, data, etag) is not None
        if not done:
            raise self._in_the_way()

    def _in_the_way(self) -> ConflictError:
        return ConflictError(f"{self._store.url}: another run compacts this ledger now; start again when it is done")

    def _pending(self) -> list[str]:
        return sorted(name for name in self._store.names(layout.UPLOADS_COMMITS) if name.endswith(".json"))

    def _read(self, names: list[str], *, again: bool = True) -> tuple[list[UnitCommit], Manifest]:
        """Commits, then the manifest; once more if a commit was compacted in between."""
        for _ in range(_TRIES if again else 1):
            with ThreadPoolExecutor(_READERS) as pool:
                found = pool.map(partial(UnitCommit.read, self._store), names)
                commits = [one for one in found if one is not None]
            if len(commits) == len(names):
                return commits, self.manifest()
            names = self._pending()
        raise self._in_the_way()

    def _open(self, segment: Segment, stack: contextlib.ExitStack) -> tuple[IO[bytes], str]:
        """A segment's file, which the stack will close, and where it is."""
        name = layout.upload_segment(segment.name)
        return stack.enter_context(self._store.open(name)), f"{self._store.url}/{name}"


def _rows(commits: list[UnitCommit]) -> Iterator[Row]:
    for commit in commits:
        yield from commit.rows


def _sorted(commits: list[UnitCommit]) -> list[Values]:
    """Rows of some commits, sorted, the latest version of each name."""
    latest: dict[str, Row] = {}
    for row in _rows(commits):
        found = latest.get(row.name)
        if found is None or (found.version, found.etag) < (row.version, row.etag):
            latest[row.name] = row
    return [values_of(latest[name]) for name in sorted(latest)]


def _mergeable(sizes: list[int]) -> int:
    """How many segments, from the end, are merged into one: while the one before is at most _LIKE times as large."""
    total = count = 0
    for size in reversed(sizes):
        if count and size > _LIKE * total:
            break
        total += size
        count += 1
    return count
