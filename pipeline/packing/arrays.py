"""Images in arrays: CIFAR's Python batches, and .npz files as of MNIST and MedMNIST. Each image becomes a PNG."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import InputError, one_line
from pipeline.packing.items import Content, LeftOutItems, PackItem, by_file, in_order
from pipeline.packing.labels import numbered
from pipeline.packing.pickled import unpickled
from pipeline.records import Rejection, shown
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store

MAX_ARRAY_BYTES = 4 << 30  # an array is held in memory as a whole
_CIFAR_TRAIN = ("train", *(f"data_batch_{number}" for number in range(1, 6)))
_CIFAR_TEST = ("test", "test_batch")
CIFAR_FILES = frozenset((*_CIFAR_TRAIN, *_CIFAR_TEST))
_CIFAR_NAMES = (("batches.meta", "label_names"), ("meta", "fine_label_names"))
# (images, labels) by split; {} stands for the split
_NPZ_FORMS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_data", "{}_labels"))
_NPZ_WHOLE = (("images", "labels"), ("x", "y"), ("data", "labels"), ("arr_0", "arr_1"))
_SPLITS = ("train", "val", "test")


class Arrays(NamedTuple):
    """Pixels uint8 [n, H, W] or [n, H, W, C] with C 3 or 4, and a label each; `about` has lists of the same length."""

    pixels: NDArray[np.uint8]
    labels: list[int]
    about: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class ArraySource:
    """Files of arrays.

    files    in the store, in order
    classes  names by label
    split    which arrays of an .npz file
    """

    store: Store
    files: tuple[Entry, ...]
    classes: tuple[str, ...]
    split: str | None = None
    by_blocks = False

    def items(self, left: LeftOutItems) -> Iterator[PackItem]:
        for entry in self.files:
            arrays = self._load(entry.name, entry.etag)
            bytes_each = arrays.pixels[:1].nbytes
            for row, label in enumerate(arrays.labels):
                if not 0 <= label < len(self.classes):
                    where = f"{self.store.url}/{entry.name}"
                    raise InputError(f"{where}: label {label} of image {row} is none of {len(self.classes)} classes")
                name = self.classes[label]
                path = f"{_folder(name, label)}/{_stem(entry.name)}-{row:06d}.png"
                yield PackItem(path, name, bytes_each, entry.name, entry.etag, row)

    def contents(self, items: Sequence[PackItem]) -> Iterator[Content | Rejection]:
        return in_order(self._found(items))

    def _found(self, items: Sequence[PackItem]) -> Iterator[tuple[int, Content]]:
        for file, etag, numbers in by_file(items):
            arrays = self._load(file, etag)
            for number in numbers:
                row = items[number].at
                about = {name: values[row] for name, values in arrays.about.items()}
                yield number, Content("png", png_of(arrays.pixels[row]), about)

    def _load(self, name: str, etag: str) -> Arrays:
        return load_arrays(self.store, name, etag, self.split)


def png_of(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG of one image, uint8 [H, W] or [H, W, C]."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def cifar_source(store: Store, entries: Sequence[Entry], split: str | None) -> ArraySource:
    """CIFAR-10 or CIFAR-100 in a folder, with the names of its classes. Raises InputError without batches."""
    wanted = {"train": _CIFAR_TRAIN, "test": _CIFAR_TEST, None: (*_CIFAR_TRAIN, *_CIFAR_TEST)}.get(split)
    if wanted is None:
        raise InputError(f"--split {split}: CIFAR has train and test")
    there = {entry.name: entry for entry in entries}
    files = tuple(there[name] for name in wanted if name in there)
    if not files:
        raise InputError(f"{store.url}: none of {', '.join(wanted)} is there; unpack the archive, Python version")
    if split is None and {entry.name for entry in files} & set(_CIFAR_TEST) and len(files) > 1:
        raise InputError(f"{store.url} has training and test images: add --split train or --split test")
    for meta, key in _CIFAR_NAMES:
        if meta in there:
            names = unpickled(store.read(meta), f"{store.url}/{meta}").get(key)
            if isinstance(names, list) and names and all(isinstance(name, bytes | str) for name in names):
                classes = [shown(name.decode("latin-1") if isinstance(name, bytes) else name) for name in names]
                return ArraySource(store, files, _distinct(classes, f"{store.url}/{meta}"))
            raise InputError(f"{store.url}/{meta}: names no classes")
    raise InputError(f"{store.url}: batches.meta (CIFAR-10) or meta (CIFAR-100) is missing; it names the classes")


def npz_source(store: Store, entry: Entry, split: str | None) -> ArraySource:
    """The arrays of one .npz file; its classes are numbers. Raises InputError unless `split` says which, if several."""
    arrays = load_arrays(store, entry.name, entry.etag, split)
    classes = numbered(iter(arrays.labels), f"{store.url}/{entry.name}")
    return ArraySource(store, (entry,), classes, split)


def load_arrays(store: Store, name: str, etag: str, split: str | None) -> Arrays:
    """The arrays of a file. Raises InputError, naming it, for anything but images with a label each."""
    where = f"{store.url}/{name}"
    with store.open_version(name, etag) as stream:
        if name.lower().endswith(".npz"):
            pixels, labels = _npz(stream, where, split)
            return Arrays(_shaped(pixels, where), _numbers(labels, len(pixels), where), {})
        return cifar_batch(stream.read(), where)


def cifar_batch(data: bytes, where: str) -> Arrays:
    """One of CIFAR's Python batches. Raises InputError for anything else."""
    batch = unpickled(data, where)
    pixels, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise InputError(f"{where}: not a batch of CIFAR, its data are no uint8 [n, 3072]")
    count = len(pixels)
    about = {}
    names = batch.get("filenames")
    if isinstance(names, list) and len(names) == count and all(isinstance(one, bytes) for one in names):
        about["filename"] = [one.decode("latin-1") for one in names]
    if isinstance(batch.get("coarse_labels"), list):
        about["coarse_label"] = _numbers(batch["coarse_labels"], count, where)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Arrays(images, _numbers(labels, count, where), about)


def _npz(stream: Any, where: str, split: str | None) -> tuple[NDArray[Any], Any]:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = {info.filename.removesuffix(".npy") for info in archive.infolist()}
            images, labels = _pair(names, where, split)
            return _member(archive, images, where), _member(archive, labels, where)
    except (
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, KeyError),
        *(OverflowError, MemoryError, OSError),
    ) as error:
        raise InputError(f"{where}: not an .npz file of arrays ({one_line(error, 120)})") from None


def _pair(names: set[str], where: str, split: str | None) -> tuple[str, str]:
    """Names of the arrays of images and of labels."""
    pairs = {
        one: (images.format(one), labels.format(one))
        for one in _SPLITS
        for images, labels in _NPZ_FORMS
        if {images.format(one), labels.format(one)} <= names
    }
    whole = next((pair for pair in _NPZ_WHOLE if set(pair) <= names), None)
    if split is not None and split in pairs:
        return pairs[split]
    if split is None and whole is not None and not pairs:
        return whole
    if split is None and len(pairs) == 1:
        return next(iter(pairs.values()))
    held = f"it holds {', '.join(sorted(names)[:8])}"
    if pairs:
        raise InputError(f"{where}: add --split {' or --split '.join(pairs)}; {held}")
    raise InputError(f"{where}: no arrays of images and labels such as x_train and y_train; {held}")


def _member(archive: zipfile.ZipFile, name: str, where: str) -> NDArray[Any]:
    """One array, whose size is known before anything is allocated for it."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as header:
        version = np.lib.format.read_magic(header)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(header)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != info.file_size - header.tell():
            raise ValueError(f"{name} is no array of numbers, or does not fit its header")
    if size > MAX_ARRAY_BYTES:
        raise InputError(f"{where}: {name} has {size:,} bytes, more than {MAX_ARRAY_BYTES:,}: split the file")
    with archive.open(info) as body:
        return np.asarray(np.lib.format.read_array(body, allow_pickle=False))


def _shaped(pixels: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Images as uint8 [n, H, W] or [n, H, W, C]."""
    shape = pixels.shape
    if pixels.dtype == np.uint8 and all(shape):
        if len(shape) == 3 or (len(shape) == 4 and shape[3] in (3, 4)):
            return pixels
        if len(shape) == 4 and shape[3] == 1:
            return pixels[..., 0]
        if len(shape) == 4 and shape[1] in (1, 3):
            return _shaped(pixels.transpose(0, 2, 3, 1), where)
    raise InputError(f"{where}: images must be uint8 [n, H, W] or [n, H, W, C], not {pixels.dtype} {list(shape)}")


def _numbers(labels: Any, count: int, where: str) -> list[int]:
    """Labels as plain numbers, one per image."""
    try:
        values = np.asarray(labels)
    except ValueError:
        values = np.empty(0)
    if values.dtype.kind not in "iu" or values.size != count or values.shape not in ((count,), (count, 1)):
        raise InputError(f"{where}: {count} images need as many labels, which are whole numbers")
    return [int(value) for value in values.reshape(-1)]


def _distinct(classes: list[str], where: str) -> tuple[str, ...]:
    if len(set(classes)) < len(classes):
        raise InputError(f"{where}: two classes have one name")
    return tuple(classes)


def _folder(name: str, label: int) -> str:
    """A folder's name for a class: whatever a stranger called it, it stays below its parent."""
    return re.sub(r"[^\w ()&,'-]", "_", name).strip() or f"class-{label}"


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".npz")
