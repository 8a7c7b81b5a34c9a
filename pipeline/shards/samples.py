"""The samples of a shard, or of a unit of loose images: read from a store, and written to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pipeline.errors import InputError, Reason
from pipeline.hashing import canonical, sha256
from pipeline.records import File, LooseImage, Rejection, Sample, Shard
from pipeline.shards.names import content_type, output_name, stem_of
from pipeline.shards.tar import ShardWriter, is_packed, read_samples
from pipeline.storage.bounded import bounded_map
from pipeline.storage.store import Store

_THREADS = 8  # for stores with high latency, and for disks that flush several files at once
_AHEAD = 16  # images that are read before they are needed


def samples_of(
    store: Store, shard: Shard, *, max_member_bytes: int, any_version: bool = False
) -> Iterator[Sample | Rejection]:
    """The samples of a shard or unit, in order; see `read_samples`.

    any_version  read what is there, whatever its version
    Raises InputError (changed-input), before the first sample or after the last, if a file is not the one in `shard`.
    """
    if not shard.images:
        opened = store.open(shard.name) if any_version else store.open_version(shard.name, shard.etag)
        with opened as stream:
            yield from read_samples(stream, max_member_bytes=max_member_bytes)
        if not any_version:  # it may have been written anew while it was read
            store.check_version(shard.name, shard.etag)
        return

    def read(file: File) -> bytes:
        return store.read(file.name) if any_version else store.read_version(file.name, file.version)

    sample = partial(loose_sample, read=read, max_member_bytes=max_member_bytes)
    if store.is_local:  # local reads are fast: threads would only wait for each other
        yield from map(sample, shard.images)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from bounded_map(pool, sample, shard.images, ahead=_AHEAD)


def samples_of_all(store: Store, shards: Iterable[Shard], *, max_member_bytes: int) -> Iterator[Sample | Rejection]:
    """The samples of several shards or units, one after the other, whatever their versions; opened when needed."""
    for shard in shards:
        yield from samples_of(store, shard, max_member_bytes=max_member_bytes, any_version=True)


def loose_sample(image: LooseImage, read: Callable[[File], bytes], *, max_member_bytes: int) -> Sample | Rejection:
    """The sample of a loose image, or its Rejection, unread, if a file is too large; suffixes are as in a tar."""
    stem = stem_of(image.files[0].name)
    for file in image.files:
        if file.size > max_member_bytes:
            detail = f"{file.size:,} bytes exceed --max-member-bytes {max_member_bytes:,}"
            return Rejection(image.key, file.name, Reason.TOO_LARGE, detail)
    return Sample(image.key, {file.name[len(stem) + 1 :]: read(file) for file in image.files})


def label_of(sample: Sample, where: str) -> int:
    """The class of a sample, from its `.cls`. Raises InputError, naming `where` and the key, if it has none."""
    try:
        label = int(sample.members.get("cls", b""))
    except ValueError:
        label = -1
    if label < 0:
        raise InputError(f"{where}: {sample.key} has no usable .cls label (0, 1, …)")
    return label


class SampleWriter(Protocol):
    """Takes protected samples, one after the other."""

    def write(self, sample: Sample) -> None:
        """Append a sample."""


class TarOutput(ShardWriter):
    """A protected shard in a scratch folder; `size` and `sha256` are valid after the `with` block."""

    def __init__(self, shard: Shard, scratch: Path) -> None:
        super().__init__(scratch / "shard", compressed=is_packed(shard.name))
        self.images: list[LooseImage] = []
        self._name, self._path = shard.name, scratch / "shard"

    def publish(self, output: Store) -> None:
        """Put it into the output, atomically."""
        output.put_file(self._name, self._path)


class FilesOutput:
    """Protected images of a unit in a scratch folder, every member a file of its own.

    images  what was written, under the names it will have; sidecars keep theirs
    `size` and `sha256`, over all files, are valid after the `with` block.
    """

    def __init__(self, shard: Shard, scratch: Path, encode: str) -> None:
        self.num_members = self.size = 0
        self.sha256 = ""
        self.images: list[LooseImage] = []
        self._files = {image.key: image.files for image in shard.images}
        self._scratch, self._encode = scratch, encode

    def write(self, sample: Sample) -> None:
        """Write the sample's members."""
        files = []
        names = [file.name for file in self._files[sample.key]]
        names[0] = output_name(names[0], self._encode)
        for name, data in zip(names, sample.members.values(), strict=True):
            self._path(self.num_members).write_bytes(data)
            files.append(File(name, len(data), sha256(data)))
            self.num_members += 1
            self.size += len(data)
        self.images.append(LooseImage(sample.key, tuple(files)))

    def publish(self, output: Store) -> None:
        """Put all files into the output, each atomically."""
        files = [file for image in self.images for file in image.files]

        def put(number: int) -> None:
            name, path = files[number].name, self._path(number)
            if output.is_local:
                output.put_file(name, path)
            else:
                output.put(name, path.read_bytes(), content_type(name))

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in bounded_map(pool, put, range(len(files)), ahead=_AHEAD):
                pass

    def _path(self, number: int) -> Path:
        return self._scratch / f"{number:07d}"

    def __enter__(self) -> FilesOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            files = [[file.name, file.size, file.version] for image in self.images for file in image.files]
            self.sha256 = sha256(canonical(files))


def output_for(shard: Shard, scratch: Path, encode: str) -> TarOutput | FilesOutput:
    """Where the protected samples of a shard or unit are written first.

    encode  decides the names of loose images: see `output_name`
    """
    return FilesOutput(shard, scratch, encode) if shard.images else TarOutput(shard, scratch)
