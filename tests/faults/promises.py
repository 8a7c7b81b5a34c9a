"""What holds for any shard, whatever is in it, checked by the standard library's tarfile and by Pillow."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.deltas.apply import LaidDeltas, protect_shard
from pipeline.errors import Reason
from pipeline.profile import StepClock
from pipeline.records import IMAGE_SUFFIXES, Rejection, Sample
from pipeline.settings import Settings
from pipeline.shards.tar import ShardWriter, read_samples
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.surrogate import Surrogate
from tests.support.samples import ExtremeDeltas

LOSSLESS = Settings(encode="lossless", max_pixels=1_000_000, max_member_bytes=1 << 18)
SAME = replace(LOSSLESS, encode="same")


class Forwards:
    """A stream that can only be read."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


class Colours:
    """Stands for a surrogate: the mean colour is the feature."""

    resize, dimension = 8, 3

    def clock(self, *, exact: bool) -> StepClock:
        return StepClock()

    def embed_pictures(self, pictures: Sequence[NDArray[np.uint8]], clock: StepClock) -> NDArray[np.float32]:
        return np.array([one.reshape(-1, 3).mean(axis=0) for one in pictures], np.float32)


@dataclass(frozen=True)
class Done:
    """What became of a shard: the output's bytes and its quarantine."""

    output: bytes
    rejections: tuple[Rejection, ...]


def samples_of(data: bytes) -> Iterator[Sample | Rejection]:
    return read_samples(cast(IO[bytes], Forwards(data)), max_member_bytes=LOSSLESS.max_member_bytes)


def protected(data: bytes, path: Path, settings: Settings) -> Done:
    """A shard through embedding and the apply actor's own steps. No content of a shard may raise anything."""
    surrogate, limit = cast(Surrogate, Colours()), settings.max_pixels
    features, refused, _ = embed_shard(
        samples_of(data), surrogate, shard="s.tar", batch_size=8, threads=1, max_pixels=limit
    )
    clusters = {key: int(value[0]) % 8 for key, value in zip(features.keys, features.values, strict=True)}
    with ShardWriter(path, compressed=False) as writer:
        outcome = protect_shard(samples_of(data), writer, LaidDeltas(ExtremeDeltas()), clusters, settings=settings)
    total = sum(1 for _ in samples_of(data))
    assert len(features.keys) + len(refused) == outcome.num_protected + outcome.num_quarantined == total
    assert outcome.num_quarantined >= len(refused)
    assert outcome.max_abs_delta <= 16
    return Done(path.read_bytes(), outcome.rejections)


def unpacked(data: bytes) -> bytes:
    """The archive inside of a gzip stream, as far as it can be had."""
    plain = bytearray()
    while data[:2] == b"\x1f\x8b":
        unpacker, at = zlib.decompressobj(31), 0
        with contextlib.suppress(zlib.error):
            while at < len(data) and not unpacker.eof:
                part, before = data[at : at + 4096], unpacker.copy()
                try:
                    plain += unpacker.decompress(part)
                except zlib.error:  # byte by byte: what comes before the error must not be lost
                    unpacker = before
                    for byte in part:
                        plain += unpacker.decompress(bytes([byte]))
                at += len(part)
        if not unpacker.eof:
            return bytes(plain)
        data = unpacker.unused_data + data[at:]
    return bytes(plain) or data


def listed(archive: bytes) -> tuple[list[tuple[str, bytes | None]], bool]:
    """(name, body or None for what is no plain file) as the standard library reads it; False if it gave up."""
    found: list[tuple[str, bytes | None]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for info in tar:
                head = archive[info.offset_data - 512 : info.offset_data]
                if head[257:263] != b"ustar\0" and head[345:346] != b"\0":
                    return [], False  # it takes what other formats have there for a part of the name
                plain = tar.extractfile(info) if info.isreg() and not info.issparse() else None
                is_label = info.type == b"V" and not info.size  # an empty one holds nothing
                if not info.isdir() and info.type != b"D" and not is_label:  # D: of GNU, a folder too
                    found.append((info.name, plain.read() if plain else None))
    except Exception:  # it raises many things
        return found, False
    return found, not archive[tar.offset :].strip(b"\0")  # it takes a header that it cannot read for the end


def key_of(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def check_shard(data: bytes, done: Done) -> None:
    """Every promise, against what the standard library and Pillow say of input and output."""
    archive = unpacked(data)
    before, complete = listed(archive)
    complete = complete and not any(one.reason is Reason.TRUNCATED_SHARD for one in done.rejections)
    after, whole = listed(unpacked(done.output))
    assert whole
    keys = [key for key, _ in groupby(key_of(name)[0] for name, _ in after)]
    assert len(keys) == len(set(keys))
    for name, body in after:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert body is not None
        originals = [one for other, one in before if key_of(other)[0] == key_of(name)[0] and is_image(other) and one]
        if is_image(name):
            assert body not in archive, f"{name} left as it came"
            check_picture(body, originals)
        else:
            assert body in archive
            assert name.rpartition(".")[2].lower() in ("cls", "json", "txt"), f"{name} left, which is no text"
            with pytest.raises(UnidentifiedImageError):
                Image.open(io.BytesIO(body))
            assert not complete or body in [one for other, one in before if other == name], f"{name} was changed"
    for one in done.rejections:
        line = json.dumps(one.to_json(), ensure_ascii=False)
        assert len(line.encode().splitlines()) == 1
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", one.key + one.member)
    if complete:
        check_accounts(before, keys, done.rejections)


def check_accounts(before: list[tuple[str, bytes | None]], keys: list[str], rejections: Sequence[Rejection]) -> None:
    """Every run of members with one key is in the output or in quarantine, once."""
    usable = [name for name, _ in before if all(key_of(name)) and key_of(name)[0][-1:] != "/"]
    runs = Counter(key for key, _ in groupby(key_of(name)[0] for name in usable))
    nameless = len(before) - len(usable)
    assert sum(runs.values()) + nameless == len(keys) + len(rejections)
    refused_with_key = [one for one in rejections if one.key != one.member]
    refused = Counter(one.key for one in refused_with_key)
    if any(one.key not in runs for one in refused_with_key):
        return  # a member with two names, such as a sparse file: the two readers chose differently
    for key, number in runs.items():
        if key.isprintable() and len(key) < 4000:
            assert (key in keys) + refused[key] == number, key


def check_picture(encoded: bytes, originals: Sequence[bytes]) -> None:
    """Another file than any original; where nothing is lost, within epsilon of one of them, and changed."""
    image = Image.open(io.BytesIO(encoded))
    image.load()
    if image.format == "JPEG":
        assert encoded.count(b"\xff\xd8\xff") == 1, "a second picture is inside"
    if not originals:
        return
    pixels = np.asarray(image).astype(int)
    distances = [distance for one in originals for distance in distances_to(one, image.mode, pixels)]
    assert distances, "the picture has another size than it came with"
    if is_lossy_webp(encoded):
        assert any(map(is_lossy_webp, originals)), "a picture that came without loss has lost something"
    elif image.format != "JPEG":
        assert min(distances) <= 16
    if min(image.size) >= 8:
        assert 0 not in distances, "the picture is unchanged"


def is_lossy_webp(data: bytes) -> bool:
    """Whether a WebP file has its picture in a VP8 chunk; one without loss has it in VP8L."""
    at = 12
    while data[8:12] == b"WEBP" and data[at : at + 4] not in (b"VP8 ", b"VP8L", b""):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return data[8:12] == b"WEBP" and data[at : at + 4] == b"VP8 "


def distances_to(original: bytes, mode: str, after: NDArray[Any]) -> Iterator[int]:
    """Largest difference to the original, if it has the same size as it is stored."""
    try:
        image = Image.open(io.BytesIO(picture_of(original)))
        image.load()
    except Exception:  # another member of this key, that was refused
        return
    if image.mode.startswith("I"):
        before = np.asarray(image).astype(int) >> 8
        after = after >> 8 if mode.startswith("I") else after if after.ndim == 2 else after[:, :, 0]
    else:
        before = np.asarray(image.convert(mode)).astype(int)
    if before.shape == after.shape:
        yield int(np.abs(before - after).max())


def picture_of(original: bytes) -> bytes:
    """Of a PNG the chunks that its pixels come from: damage to others, which Pillow minds, is of no importance."""
    if not original.startswith(b"\x89PNG"):
        return original
    kept, at = original[:8], 8
    while at < len(original):
        end = at + 12 + int.from_bytes(original[at : at + 4], "big")
        if original[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            kept += original[at:end]
        at = end
    return kept
