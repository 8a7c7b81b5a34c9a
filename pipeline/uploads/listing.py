"""What is new: the listing and the ledger, both sorted by name, read side by side; neither is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import Reason, StoreError
from pipeline.records import shown
from pipeline.storage.listings import Entry
from pipeline.uploads.names import upload_kind
from pipeline.uploads.units import Item

Known = tuple[str, str, int]  # name, etag, version: what the ledger knows of an object
Fault = Callable[[str], tuple[Reason, str] | None]

_SHOWN = 20
_FUTURE_S = 86400.0  # no clock is wrong by more than this, so that a later time was set by somebody, long ago


@dataclass
class Tally:
    """Objects of one look at the input, each counted once; the first names of those that a reader will ask for."""

    known: int = 0  # done before, and the same since
    new: int = 0
    changed: int = 0  # done before, but another etag now
    unsettled: int = 0  # new or changed, but too recently
    skipped: int = 0  # no image and no shard
    deleted: int = 0  # done before, but no longer there
    deleted_names: list[str] = field(default_factory=list)

    @property
    def listed(self) -> int:
        return self.known + self.new + self.changed + self.unsettled + self.skipped


def changes(
    entries: Iterable[Entry], known: Iterable[Known], *, now: float, settle_s: float, fault: Fault, tally: Tally
) -> Iterator[Item]:
    """What is to be protected, in the order of names; everything is counted in `tally` as it passes.

    entries, known  sorted by name
    now             by the clock of the entries' `modified`
    fault           name -> why it is refused
    Raises StoreError if the listing is not sorted: what is new could not be told then.
    """
    settled = now - settle_s if settle_s else float("inf")  # clocks of servers are told in whole seconds
    rows = iter(known)
    nothing = ("", "", 0)  # no object has this name
    row_name, row_etag, version = next(rows, nothing)
    last = ""
    for entry in entries:  # nearly all are known: what is done here is done for every object of the prefix
        name = entry[0]
        if name <= last:
            raise StoreError(f"the store lists {shown(name)} after {shown(last)}: a listing in byte order is needed")
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
    kind = upload_kind(entry.name)
    if kind is None:
        tally.skipped += 1
        return None
    if settled < entry.modified < now + _FUTURE_S:
        tally.unsettled += 1
        return None
    if version:
        tally.changed += 1
    else:
        tally.new += 1
    found = fault(entry.name)
    if found is None and not entry.etag:
        found = Reason.NOT_A_FILE, "a link or a device is not followed"
    return Item(entry.name, entry.size, entry.etag, kind, version + 1, found)


def _count_deleted(name: str, tally: Tally) -> None:
    tally.deleted += 1
    if len(tally.deleted_names) < _SHOWN:
        tally.deleted_names.append(shown(name))
