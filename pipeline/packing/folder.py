"""A folder or prefix of loose images: the class is the first folder, or what a table of labels says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import InputError, Reason
from pipeline.packing.items import Content, LeftOutItems, PackItem, class_folder, rejected
from pipeline.packing.labels import LabelTable
from pipeline.records import Rejection
from pipeline.storage.bounded import bounded_map
from pipeline.storage.store import Store

READERS = 16  # threads, for stores with high latency
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class FolderSource:
    """Images below a store's root.

    table  labels by path; None: the class is the first folder. Images that it does not name are left out
    """

    store: Store
    table: LabelTable | None = None
    by_blocks = False

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.table.classes if self.table is not None else None

    def items(self, left: LeftOutItems) -> Iterator[PackItem]:
        names = self.table.class_names if self.table is not None else None
        missing = set(names or ())
        folders: set[str] = set()
        for entry in self.store.walk():
            name = entry.name
            if name.endswith("/") or not left.accepts(name, entry.size, is_file=bool(entry.etag)):
                missing.discard(name)
                continue
            if names is not None and name not in names:
                left.other(name)
                continue
            missing.discard(name)
            class_name = class_folder(name) if names is None else names[name]
            folders.add(class_folder(name))
            yield PackItem(name, class_name, entry.size, "", entry.etag, 0)
        if missing:
            raise InputError(
                f"--labels names {len(missing):,} files that are not in {self.store.url}, e.g. {min(missing)}"
            )
        if names is None:
            check_no_splits(folders, self.store.url, "add --split NAME")

    def contents(self, items: Sequence[PackItem]) -> Iterator[Content | Rejection]:
        if self.store.is_local:  # threads would only wait for each other
            yield from map(self._content, items)
            return
        with ThreadPoolExecutor(READERS) as pool:
            yield from bounded_map(pool, self._content, items, ahead=2 * READERS)

    def _content(self, item: PackItem) -> Content | Rejection:
        data = self.store.read_if(item.path, item.etag)
        if data is None:
            raise InputError(
                f"changed-input: {self.store.url}/{item.path} is gone, or another version than was planned; "
                "use a new --output to plan again"
            )
        if not data:
            return rejected(item, Reason.EMPTY, "0 bytes")
        return Content(item.path.rpartition(".")[2].lower(), data, _NOTHING)


_NOTHING: Mapping[str, str] = {}


def check_no_splits(folders: Collection[str], where: str, advice: str) -> None:
    """Raise InputError if the folders at the top of a collection are its splits rather than its classes."""
    if folders and _SPLITS.issuperset(folders):
        raise InputError(f"{where} has the splits {', '.join(sorted(folders))}, which are no classes: {advice}")
