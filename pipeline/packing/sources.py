"""Which source an input is: told by its name and its first files, or by --format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from pipeline.errors import InputError, SettingsError
from pipeline.layout import RUN_FOLDER
from pipeline.packing.archives import TarSource
from pipeline.packing.arrays import CIFAR_FILES, ArraySource, cifar_source, npz_source
from pipeline.packing.folder import FolderSource
from pipeline.packing.items import DataSource
from pipeline.packing.labels import read_ground_truth, read_labels
from pipeline.packing.parquet import ParquetSource, parquet_source
from pipeline.packing.settings import Format, PackSettings
from pipeline.records import IMAGE_SUFFIXES
from pipeline.settings import check
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store, file_at

_LargeFiles = TarSource | ArraySource | ParquetSource

_LOOKED_AT = 1000  # first files, which tell the format
_BY_ENDING: dict[str, Format] = {".tar": "tar", ".npz": "npz", ".parquet": "parquet"}


class Found(NamedTuple):
    """A source, and where it lies.

    is_file  True if it is a single file of the store, which may hold other things
    beside   what lies in a folder of few large files beside those that are read
    """

    store: Store
    source: DataSource
    format: str
    is_file: bool = False
    beside: tuple[Entry, ...] = ()


def source_for(settings: PackSettings) -> Found:
    """The source that --input means. Raises InputError or SettingsError if there is none."""
    store, single = _place(settings)
    first = [single] if single else list(islice(store.walk(), _LOOKED_AT))
    if not first:
        raise InputError(f"{store.url} is empty; check the path")
    kind = settings.format if settings.format != "auto" else _format_of(first, is_single=single is not None)
    _check_options(settings, kind)
    if kind == "folder":
        if single is not None:
            raise InputError(f"{settings.input} is a file: expected a folder, or a .tar, .npz or .parquet")
        table = read_labels(settings.labels) if settings.labels else None
        within = _within_split(store, settings.split, first)
        return Found(within, FolderSource(within, table), kind)
    if single is not None:
        return Found(store, _MAKERS[kind](settings, store, [single]), kind, is_file=True)
    entries = sorted(store.list(), key=attrgetter("name"))
    files = [entry for entry in entries if entry.etag and not entry.name.startswith(f"{RUN_FOLDER}/")]
    source = _MAKERS[kind](settings, store, files)
    return Found(store, source, kind, beside=tuple(_beside(entries, source, settings.split)))


def _place(settings: PackSettings) -> tuple[Store, Entry | None]:
    """The store, and the file in it that the input is, if it is one."""
    if settings.input.lower().endswith((".tar.gz", ".tgz", ".zip", ".gz", ".zst", ".xz", ".bz2", ".7z", ".rar")):
        raise InputError(f"{settings.input} is compressed: unpack it first, to a .tar or a folder")
    store, name = file_at(settings.input.rstrip("/"))
    entry = store.info(name) if name else None
    if entry is not None and not entry.etag:
        raise InputError(f"{settings.input} is neither a file nor a folder")
    return (store, entry) if entry is not None else (Store(settings.input), None)


def _format_of(first: Sequence[Entry], *, is_single: bool) -> Format:
    names = [entry.name for entry in first if not entry.name.startswith(f"{RUN_FOLDER}/")]
    endings = [next((ending for ending in _BY_ENDING if name.lower().endswith(ending)), "") for name in names]
    if is_single:
        return _BY_ENDING.get(endings[0], "folder")
    if any(name.lower().rpartition(".")[2] in IMAGE_SUFFIXES for name in names):
        return "folder"
    if CIFAR_FILES & set(names):
        return "cifar"
    return next((_BY_ENDING[ending] for ending in _BY_ENDING if ending in endings), "folder")


def _check_options(settings: PackSettings, kind: str) -> None:
    for name, kinds in (
        ("labels", ("folder",)),
        ("ground_truth", ("tar",)),
        ("split", ("folder", "cifar", "npz", "parquet")),
    ):
        given = getattr(settings, name) is not None
        flag = f"--{name.replace('_', '-')}"
        check(not given or kind in kinds, f"{flag} is for {', '.join(kinds)}; {settings.input} is {kind}")


def _within_split(store: Store, split: str | None, first: Sequence[Entry]) -> Store:
    if split is None:
        return store
    if "/" in split or split in ("", ".", ".."):
        raise SettingsError(f"--split {split}: the name of a folder within --input")
    within = Store(f"{store.url}/{split}")
    if next(within.names(), None) is None:
        seen = sorted({entry.name.partition("/")[0] for entry in first if "/" in entry.name})
        raise InputError(f"--split {split}: no such folder in {store.url}; it has {', '.join(seen[:5]) or 'none'}")
    return within


def _beside(entries: Sequence[Entry], source: _LargeFiles, split: str | None) -> Iterator[Entry]:
    """What is not read, but for the other splits of a set of which one was asked for."""
    known = {entry.name for entry in source.files} | CIFAR_FILES
    if split is not None:
        known |= {entry.name for entry in entries if entry.name.lower().endswith(".parquet")}
    return (entry for entry in entries if entry.name not in known)


def _ending(files: Sequence[Entry], ending: str) -> list[Entry]:
    return [entry for entry in files if entry.name.lower().endswith(ending)]


def _tar(settings: PackSettings, store: Store, files: Sequence[Entry]) -> TarSource:
    truth = None
    if settings.ground_truth is not None:
        truth = tuple(read_ground_truth(settings.ground_truth, settings.synsets))
    archives = tuple(_ending(files, ".tar"))
    return TarSource(store, archives, by_name=len(archives) > 1 and truth is None, truth=truth)


def _cifar(settings: PackSettings, store: Store, files: Sequence[Entry]) -> ArraySource:
    return cifar_source(store, files, settings.split)


def _npz(settings: PackSettings, store: Store, files: Sequence[Entry]) -> ArraySource:
    found = _ending(files, ".npz")
    if len(found) != 1:
        raise InputError(f"{settings.input}: {len(found)} .npz files; pass one of them as --input")
    return npz_source(store, found[0], settings.split)


def _parquet(settings: PackSettings, store: Store, files: Sequence[Entry]) -> ParquetSource:
    found = _ending(files, ".parquet")
    if settings.split is not None:
        # as Hugging Face names them: data/train-00000-of-00005.parquet, or a folder of the split's name
        of_split = [entry for entry in found if _is_of_split(entry.name, settings.split)]
        if found and not of_split:
            raise InputError(
                f"--split {settings.split}: none of {len(found)} files is called like it, e.g. {found[0].name}"
            )
        found = of_split
    elif len(splits := {_split_of(entry.name) for entry in found} - {""}) > 1:
        raise InputError(f"{store.url} has the splits {', '.join(sorted(splits))}: add --split NAME")
    return parquet_source(store, found, settings.max_member_bytes)


def _is_of_split(name: str, split: str) -> bool:
    *folders, base = name.split("/")
    return split in folders or base.startswith((f"{split}-", f"{split}.", f"{split}_"))


def _split_of(name: str) -> str:
    return next((split for split in ("train", "validation", "val", "test") if _is_of_split(name, split)), "")


_MAKERS: dict[str, Callable[[PackSettings, Store, Sequence[Entry]], _LargeFiles]] = {
    "tar": _tar,
    "cifar": _cifar,
    "npz": _npz,
    "parquet": _parquet,
}
