"""Find what is new: the listing and the ledger, both sorted by name, are read side by side and never held in memory.

Of what is new, so much is held that a run can tell how much it has left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import Reason, ScumbleError, StoreError
from pipeline.records import shown
from pipeline.shards.names import unread
from pipeline.storage.listings import Entry
from pipeline.uploads.names import IMAGE, is_no_upload, upload_kind
from pipeline.uploads.units import Item

Known = tuple[str, str, int]  # name, etag, version: what the ledger knows about an object
Fault = Callable[[str], tuple[Reason, str] | None]

_NO_FILE = (Reason.NOT_A_FILE, "links and devices are not followed")
MOST_AHEAD = 100_000  # items, 40 MB
_SHOWN = 20
_FUTURE_S = 86400.0  # no clock is off by more than this; a later time was set by hand and says nothing about age


@dataclass
class Tally:
    """Counts from one pass over the input, each object once, with the first few names of deleted ones."""

    known: int = 0  # processed before, unchanged since
    new: int = 0
    changed: int = 0  # processed before, but the etag has changed
    unsettled: int = 0  # new or changed too recently
    skipped: int = 0  # nothing that may be a picture or hold some
    deleted: int = 0  # processed before, but gone now
    deleted_names: list[str] = field(default_factory=list)

    @property
    def listed(self) -> int:
        return self.known + self.new + self.changed + self.unsettled + self.skipped


class LookedAhead(Iterator[Item]):
    """Items one by one, as they are found or found before.

    Looking ahead tells how much there is to do, and costs no listing that would not be made anyway.
    is_whole  all have been found
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self.is_whole = False
        self._looked = time.monotonic()
        self._items, self._waiting = items, deque[Item]()
        self._failure: ScumbleError | None = None

    def __next__(self) -> Item:
        if not self._waiting:
            if self._failure is not None:
                raise self._failure
            self._find()
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def look(self, share: float) -> None:
        """Look ahead for a share of the time since the last look; what fails is raised after what was found before."""
        now = time.monotonic()
        until = now + share * (now - self._looked)
        while not self.is_whole and self._failure is None and len(self._waiting) < MOST_AHEAD and now < until:
            try:
                self._find()
            except ScumbleError as error:
                self._failure = error
            now = time.monotonic()
        self._looked = now

    def _find(self) -> None:
        for item in self._items:
            self._waiting.append(item)
            return
        self.is_whole = True


def changes(
    entries: Iterable[Entry], known: Iterable[Known], *, now: float, settle_s: float, fault: Fault, tally: Tally
) -> Iterator[Item]:
    """Yield what is to be protected, sorted by name; counts everything in `tally` on the way.

    entries   sorted by name
    known     sorted by name
    now       by the clock behind the entries' `modified`
    settle_s  seconds since the last change after which an upload counts as complete
    fault     name -> why it is refused, or None
    Raises StoreError if the listing is not sorted, because new objects could not be identified.
    """
    settled = now - settle_s if settle_s else float("inf")  # servers report times in whole seconds
    rows = iter(known)
    nothing = ("", "", 0)  # no object has this name
    row_name, row_etag, version = next(rows, nothing)
    last = ""
    for entry in entries:  # hot loop: nearly all objects are known already
        name = entry[0]
        if name <= last:
            raise StoreError(f"the store lists {shown(name)} after {shown(last)}, but listings must be in byte order")
        last = name
        while row_name < name and row_name:
            _count_deleted(row_name, tally)
            row_name, row_etag, version = next(rows, nothing)
        before = 0
        if row_name == name:
            before, etag = version, row_etag
            row_name, row_etag, version = next(rows, nothing)
            if etag == entry[2]:
                tally.known += 1
                continue
        item = _judged(entry, before, settled, now, fault, tally)
        if item is not None:
            yield item
    while row_name:
        _count_deleted(row_name, tally)
        row_name, row_etag, version = next(rows, nothing)


def _judged(entry: Entry, version: int, settled: float, now: float, fault: Fault, tally: Tally) -> Item | None:
    kind, refusal = upload_kind(entry.name), fault(entry.name)
    if kind is None:
        refusal = None if is_no_upload(entry.name) else unread(entry.name) or (None if entry.etag else _NO_FILE)
        if refusal is None:
            tally.skipped += 1
            return None
        kind = IMAGE
    if settled < entry.modified < now + _FUTURE_S:
        tally.unsettled += 1
        return None
    if version:
        tally.changed += 1
    else:
        tally.new += 1
    if refusal is None and not entry.etag:
        refusal = _NO_FILE
    return Item(entry.name, entry.size, entry.etag, kind, version + 1, refusal)


def _count_deleted(name: str, tally: Tally) -> None:
    tally.deleted += 1
    if len(tally.deleted_names) < _SHOWN:
        tally.deleted_names.append(shown(name))
