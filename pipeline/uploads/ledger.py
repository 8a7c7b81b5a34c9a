"""What was done with every object: the union of unit commits, compacted into segments sorted by name.

A unit counts once its commit has been created (if absent). `compact` writes commits into a segment, adds it to the
manifest by compare-and-swap, and only then deletes them. Segments of similar size are merged, so that there are few and
each row is rewritten only a few times. A row found twice counts once: the latest version of a name wins. Readers read
the commits first, then the manifest: a row that moves from one to the other in between is seen twice, never missed.
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
_COMMITS_AT_ONCE = 200  # held in memory while compacting
_LIKE = 4  # a segment up to this many times as large is merged with those after it
_READERS = 16
_TRIES = 3
_L = TypeVar("_L", bound="_LedgerRecord")


class _LedgerRecord(CompactRecord):
    """A record that states its format; another format is refused before its fields are examined."""

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "format": FORMAT}

    @classmethod
    def from_json(cls: type[_L], value: Any) -> _L:
        if not isinstance(value, dict):
            return super().from_json(value)
        rest = dict(value)
        given = json.dumps(rest.pop("format", None))
        if given != str(FORMAT):
            raise ValueError(f"format is {given[:40]}; this version reads {FORMAT}")
        return super().from_json(rest)


@dataclass(frozen=True)
class UnitCommit(_LedgerRecord):
    """A unit's commit; without timestamps, so that two runs that did the same wrote the same bytes."""

    unit: str
    fingerprint: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Manifest(_LedgerRecord):
    """ledger.json: the current segments, oldest and largest first.

    retired  names of segments replaced by the last compaction, not deleted yet
    """

    segments: tuple[Segment, ...]
    retired: tuple[str, ...]

    cure = "restore it; without it, everything would be protected again"


class Ledger:
    """The ledger of an output."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def known(self) -> Iterator[Known]:
        """(name, etag, version) of every processed object, sorted by name; holds only a few blocks of rows."""
        commits, manifest = self._read(self._pending())
        pending = sorted(((row.name, row.etag, row.version) for row in _rows(commits)), key=lambda row: row[0])
        with contextlib.ExitStack() as stack:
            parts = [read_known(*self._open(segment, stack)) for segment in manifest.segments]
            yield from merged_known([*parts, iter(pending)] if pending or not parts else parts)

    def rows(self) -> Iterator[Row]:
        """The row of every object, sorted by name."""
        commits, manifest = self._read(self._pending())
        with contextlib.ExitStack() as stack:
            parts = [read_values(*self._open(segment, stack)) for segment in manifest.segments]
            for values in merged([*parts, iter(_sorted(commits))]):
                yield Row(*values)

    def manifest(self) -> Manifest:
        """The current segments. Raises InputError if the ledger file is damaged or of another version."""
        return self._look()[0]

    def _look(self) -> tuple[Manifest, str | None]:
        """The manifest and the etag of its object, or None if there is none yet."""
        found = self._store.read_with_etag(layout.UPLOADS_LEDGER)
        if found is None:
            return Manifest((), ()), None
        data, etag = found
        return Manifest.from_bytes(data, f"{self._store.url}/{layout.UPLOADS_LEDGER}"), etag

    def commit(self, commit: UnitCommit) -> None:
        """Commit a unit. Raises ConflictError if another run committed the same unit with different bytes.

        Where only one of the two runs could read an object, the existing commit decides. Raises InputError if it is
        damaged.
        """
        name = layout.upload_commit(commit.unit)
        if self._store.create(name, commit.to_bytes()):
            return
        existing = UnitCommit.read(self._store, name)
        theirs = (
            {row.name: row for row in existing.rows} if existing else {}
        )  # None: already compacted, by a run that has seen it
        for ours in commit.rows:
            other = theirs.get(ours.name, ours)
            if not ours.agrees_with(other):
                raise ConflictError(
                    f"{ours.name}: committed with SHA-256 {other.output_sha256[:16]}, produced here with "
                    f"{ours.output_sha256[:16]}: two runs disagree; compare their machines' library versions"
                )

    def compact(self, *, merge: bool, before: Callable[[], None] = lambda: None) -> None:
        """Write commits into segments, in batches of bounded memory.

        merge   also merge segments of similar size. Those replaced are deleted by the next merging compaction, so that
                current readers can finish.
        before  called before anything visible to others is replaced or deleted; raises to stop
        """
        names = self._pending()
        while names:
            some, names = names[:_COMMITS_AT_ONCE], names[_COMMITS_AT_ONCE:]
            commits, _ = self._read(some, again=False)
            segment = self._write(iter(_sorted(commits)))
            self._append(segment, before)
            self._store.delete(some)
        if merge:
            self._merge(before)

    def _merge(self, before: Callable[[], None]) -> None:
        manifest, etag = self._look()
        count = _mergeable([segment.rows for segment in manifest.segments])
        if count < 2:
            return
        stale = {*manifest.retired, *self._orphans(manifest)}
        kept, parts = manifest.segments[:-count], manifest.segments[-count:]
        with contextlib.ExitStack() as stack:
            rows = merged([read_values(*self._open(part, stack)) for part in parts])
            segment = self._write(rows)
        before()
        retired = tuple(part.name for part in parts)
        self._put(Manifest((*kept, segment), retired), etag)
        self._store.delete(layout.upload_segment(name) for name in sorted(stale))

    def _orphans(self, manifest: Manifest) -> set[str]:
        """Segments that no manifest names: a compaction died before its swap, or is about to fail at it."""
        prefix, ending = f"{layout.UPLOADS_SEGMENTS}/", ".parquet"
        there = {name[len(prefix) : -len(ending)] for name in self._store.names(layout.UPLOADS_SEGMENTS)}
        return there - {segment.name for segment in manifest.segments} - set(manifest.retired)

    def _write(self, rows: Iterator[Values]) -> Segment:
        name = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="scumble-") as scratch:
            path = Path(scratch) / "segment"
            segment = write_segment(rows, path, name)
            self._store.put_file(layout.upload_segment(name), path)
        return segment

    def _append(self, segment: Segment, before: Callable[[], None]) -> None:
        """Name a segment in the manifest.

        What deletes segments that the manifest does not name changes the manifest first. So it is looked at before
        `before` asks whether this run may go on: if another has taken over since, the manifest is not replaced.
        """
        for attempt in range(_TRIES):
            old, etag = self._look()
            before()
            try:
                self._put(Manifest((*old.segments, segment), old.retired), etag)
                return
            except ConflictError:
                if attempt == _TRIES - 1:
                    raise

    def _put(self, manifest: Manifest, etag: str | None) -> None:
        """Write the manifest.

        etag  of the version to replace; None if there is none
        """
        data = manifest.to_bytes()
        if etag is None:
            done = self._store.create(layout.UPLOADS_LEDGER, data)
        else:
            done = self._store.replace_if(layout.UPLOADS_LEDGER, data, etag) is not None
        if not done:
            raise self._in_the_way()

    def _in_the_way(self) -> ConflictError:
        return ConflictError(f"{self._store.url}: another run is compacting this ledger; start again when it is done")

    def _pending(self) -> list[str]:
        return sorted(name for name in self._store.names(layout.UPLOADS_COMMITS) if name.endswith(".json"))

    def _read(self, names: list[str], *, again: bool = True) -> tuple[list[UnitCommit], Manifest]:
        """Read commits, then the manifest; retry if a commit was compacted in between."""
        for _ in range(_TRIES if again else 1):
            with ThreadPoolExecutor(_READERS) as pool:
                results = pool.map(partial(UnitCommit.read, self._store), names)
                commits = [commit for commit in results if commit is not None]
            if len(commits) == len(names):
                return commits, self.manifest()
            names = self._pending()
        raise self._in_the_way()

    def _open(self, segment: Segment, stack: contextlib.ExitStack) -> tuple[IO[bytes], str]:
        """A segment's open file, closed by the stack, and its location."""
        name = layout.upload_segment(segment.name)
        return stack.enter_context(self._store.open(name)), f"{self._store.url}/{name}"


def _rows(commits: list[UnitCommit]) -> Iterator[Row]:
    for commit in commits:
        yield from commit.rows


def _sorted(commits: list[UnitCommit]) -> list[Values]:
    """Rows of some commits, sorted by name, only the latest version of each."""
    latest: dict[str, Row] = {}
    for row in _rows(commits):
        known = latest.get(row.name)
        if known is None or (known.version, known.etag) < (row.version, row.etag):
            latest[row.name] = row
    return [values_of(latest[name]) for name in sorted(latest)]


def _mergeable(sizes: list[int]) -> int:
    """How many segments to merge, from the end: while the previous one is at most _LIKE times as large as their sum."""
    total = count = 0
    for size in reversed(sizes):
        if count and size > _LIKE * total:
            break
        total += size
        count += 1
    return count
