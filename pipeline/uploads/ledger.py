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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipeline import layout
from pipeline.errors import ConflictError, InputError
from pipeline.fingerprint import canonical
from pipeline.store import Store
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


@dataclass(frozen=True)
class UnitCommit:
    """What a unit's commit holds; it has no times, so that two who did the same wrote the same."""

    unit: str
    fingerprint: str
    rows: tuple[Row, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        rows = [asdict(row) for row in self.rows]
        return canonical({"format": FORMAT, "unit": self.unit, "fingerprint": self.fingerprint, "rows": rows})

    @classmethod
    def from_bytes(cls, data: bytes) -> UnitCommit:
        """The inverse of `to_bytes`. Raises InputError if it is none, or of another format."""
        try:
            fields = json.loads(data)
            if fields["format"] != FORMAT:
                raise InputError(f"a commit of format {fields['format']}; this version reads {FORMAT}")
            return cls(fields["unit"], fields["fingerprint"], tuple(Row(**row) for row in fields["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a commit of uploads ({error})") from None


@dataclass(frozen=True)
class Manifest:
    """The segments that count, oldest and largest first; those that the last compaction replaced are not deleted yet.

    etag  of the object it was read from; None if there is none
    """

    segments: tuple[Segment, ...] = ()
    retired: tuple[str, ...] = ()
    etag: str | None = None


class Ledger:
    """The ledger below an output."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def known(self) -> Iterator[Known]:
        """(name, etag, version) of every object that was done, sorted by name; holds some blocks of rows."""
        commits, manifest = self._read(self._pending())
        pending = sorted(((row.name, row.etag, row.version) for row in _rows(commits)), key=lambda one: one[0])
        with contextlib.ExitStack() as stack:
            parts = [read_known(stack.enter_context(self._open(one))) for one in manifest.segments]
            yield from merged_known([*parts, iter(pending)] if pending or not parts else parts)

    def rows(self) -> Iterator[Row]:
        """All that is known of every object, sorted by name."""
        commits, manifest = self._read(self._pending())
        with contextlib.ExitStack() as stack:
            parts = [read_values(stack.enter_context(self._open(one))) for one in manifest.segments]
            for values in merged([*parts, iter(_sorted(commits))]):
                yield Row(*values)

    def manifest(self) -> Manifest:
        """The segments that count now."""
        seen = self._store.look(layout.UPLOADS_LEDGER)
        if seen is None:
            return Manifest()
        fields = json.loads(seen.data)
        if fields["format"] != FORMAT:
            raise InputError(f"{self._store.url}: a ledger of format {fields['format']}; this version reads {FORMAT}")
        return Manifest(tuple(Segment(**one) for one in fields["segments"]), tuple(fields["retired"]), seen.etag)

    def commit(self, commit: UnitCommit) -> None:
        """Make a unit count. Raises ConflictError if somebody committed the same unit with other bytes."""
        name = layout.upload_commit(commit.unit)
        if self._store.create(name, commit.to_bytes()):
            return
        try:
            theirs = UnitCommit.from_bytes(self._store.read(name))
        except InputError:
            return  # compacted meanwhile: whoever did it has seen it
        for ours, other in zip(commit.rows, theirs.rows, strict=True):
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
        manifest = self.manifest()
        count = _mergeable([one.rows for one in manifest.segments])
        if count < 2:
            return
        stale = {*manifest.retired, *self._orphans(manifest)}
        kept, parts = manifest.segments[:-count], manifest.segments[-count:]
        with contextlib.ExitStack() as stack:
            rows = merged([read_values(stack.enter_context(self._open(one))) for one in parts])
            segment = self._write(rows)
        before()
        retired = tuple(one.name for one in parts)
        self._put(Manifest((*kept, segment), retired, manifest.etag))
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
            old = self.manifest()
            new = changed(old)
            try:
                self._put(Manifest(new.segments, new.retired, old.etag))
                return
            except ConflictError:
                if attempt == _TRIES - 1:
                    raise

    def _put(self, manifest: Manifest) -> None:
        fields: dict[str, Any] = {"format": FORMAT, "segments": [asdict(one) for one in manifest.segments]}
        data = canonical(fields | {"retired": list(manifest.retired)})
        if manifest.etag is None:
            done = self._store.create(layout.UPLOADS_LEDGER, data)
        else:
            done = self._store.replace_if(layout.UPLOADS_LEDGER, data, manifest.etag) is not None
        if not done:
            raise ConflictError(f"{self._store.url}: another run compacts this ledger now; start again when it is done")

    def _pending(self) -> list[str]:
        return sorted(name for name in self._store.names(layout.UPLOADS_COMMITS) if name.endswith(".json"))

    def _read(self, names: list[str], *, again: bool = True) -> tuple[list[UnitCommit], Manifest]:
        """Commits, then the manifest; once more if a commit was compacted in between."""
        for attempt in range(_TRIES):
            try:
                with ThreadPoolExecutor(_READERS) as pool:
                    commits = [UnitCommit.from_bytes(data) for data in pool.map(self._store.read, names)]
                return commits, self.manifest()
            except InputError:
                if not again or attempt == _TRIES - 1:
                    raise
                names = self._pending()
        raise AssertionError("unreachable")

    def _open(self, segment: Segment) -> IO[bytes]:
        return self._store.open(layout.upload_segment(segment.name))


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
