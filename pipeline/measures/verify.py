"""Check that the output still matches its commits: recount, re-hash, re-read, decode a sample, check epsilon."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from pipeline.deltas.delta import levels_of
from pipeline.errors import SampleError
from pipeline.hashing import in_sample, sha256
from pipeline.pictures.members import check_sidecars, image_suffix
from pipeline.pictures.picture import decode, resize_and_crop
from pipeline.records import Commit, LooseImage, Rejection, Sample
from pipeline.settings import ApplySettings
from pipeline.shards.names import stem_of
from pipeline.shards.tar import ANY_BYTES, read_samples
from pipeline.storage.store import Store
from pipeline.storage.streams import HashingReader


@dataclass(frozen=True, kw_only=True)
class VerifySettings(ApplySettings):
    """What verification needs of a run's settings.

    epsilon  bound on |delta|, pixel units; NO_BOUND of deltas that have none
    """

    epsilon: float
    seed: int = 0


@dataclass(frozen=True)
class Expected:
    """What a record says about one protected shard; num_members is None if the record does not say."""

    shard: str
    size: int
    sha256: str
    num_samples: int
    num_members: int | None = None

    @classmethod
    def of(cls, commit: Commit) -> Expected:
        """From a commit."""
        return cls(commit.shard, commit.output_size, commit.output_sha256, commit.num_protected, commit.num_members)


_COUNTS = ("files", "num_samples", "num_decoded", "num_compared", "num_exact", "num_reread")
_ADDED = (*_COUNTS, "input_image_bytes", "output_image_bytes", "survival", "problems", "lost", "written")


@dataclass
class ShardCheck:
    """Findings for one file, or for several added up. Each problem is a line naming shard and key."""

    shard: str
    problems: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_decoded: int = 0
    num_compared: int = 0  # files, with their originals; of uploads alone
    num_exact: int = 0  # decoded samples stored losslessly, on which the bound was checked
    max_abs_delta: int = 0  # over decoded samples, in 8-bit levels, after the codec
    max_exact_delta: int = 0
    lost: list[str] = field(default_factory=list)  # parts of the original that could not be read
    written: list[str] = field(default_factory=list)  # names that its record knows
    files: int = 1
    # as the commits say; zero for uploads, whose records do not
    input_image_bytes: int = 0
    output_image_bytes: int = 0
    num_reread: int = 0  # pictures decoded again when they were written
    survival: float = 0.0  # sum of the shares of their deltas that were left

    def fail(self, key: str, what: str) -> None:
        self.problems.append(f"{self.shard}{f' key {key}' if key else ''}: {what}")

    def add(self, other: ShardCheck) -> None:
        """Merge in the findings for other files."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("max_exact_delta", "max_abs_delta"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


def verify_shard(
    expected: Expected,
    output: IO[bytes],
    source: IO[bytes] | None,
    quarantined: set[str],
    *,
    settings: VerifySettings,
    decode_share: float,
) -> ShardCheck:
    """Compare one protected shard with its record and, if available, with the originals.

    output        stream of the protected shard
    source        stream of the original shard, or None
    quarantined   keys in the shard's quarantine
    decode_share  share of samples to decode, chosen by hash; 1.0 = all
    """
    check = ShardCheck(expected.shard)
    hashed = HashingReader(output)
    originals = read_samples(source, max_member_bytes=settings.max_member_bytes) if source is not None else None
    samples = read_samples(io.BufferedReader(hashed, 1 << 20), max_member_bytes=ANY_BYTES)
    num_members = _compare(check, samples, originals, quarantined, settings, decode_share)
    hashed.drain()
    found = {"bytes": (hashed.size, expected.size), "SHA-256": (hashed.sha256, expected.sha256)}
    _compare_counts(check, found | _counts(check, expected, num_members))
    return check


def verify_images(
    commit: Commit,
    output: Store,
    source: Iterable[Sample | Rejection] | None,
    quarantined: set[str],
    *,
    settings: VerifySettings,
    decode_share: float,
) -> ShardCheck:
    """Compare a unit of loose protected images with its commit, file by file, and with the originals, if available.

    Parameters as in verify_shard.
    """
    check = ShardCheck(commit.shard, files=sum(len(image.files) for image in commit.images))
    samples = _intact(check, commit.images, output)
    num_members = _compare(check, samples, source, quarantined, settings, decode_share)
    _compare_counts(check, _counts(check, Expected.of(commit), num_members))
    return check


def _intact(check: ShardCheck, images: Iterable[LooseImage], output: Store) -> Iterator[Sample]:
    """The images that are there with all their files."""
    for image in images:
        stem, members = stem_of(image.files[0].name), dict[str, bytes]()
        for file in image.files:
            data = output.read_if_there(file.name)
            if data is None:
                check.fail(image.key, f"{file.name} is missing")
                continue
            members[file.name[len(stem) + 1 :]] = data
            if (digest := sha256(data)) != file.version:
                check.fail(image.key, f"{file.name}: SHA-256: found {digest}, but the record says {file.version}")
        if len(members) == len(image.files):
            yield Sample(image.key, members)


def _compare(
    check: ShardCheck,
    samples: Iterable[Sample | Rejection],
    source: Iterable[Sample | Rejection] | None,
    quarantined: set[str],
    settings: VerifySettings,
    decode_share: float,
) -> int:
    """Compare samples with the originals; returns the number of members."""
    originals = None if source is None else (item for item in source if isinstance(item, Sample))
    num_members = 0
    for item in samples:
        if isinstance(item, Rejection):
            check.fail(item.key, f"cannot be read back ({item.reason.value}: {item.detail})")
            continue
        check.num_samples += 1
        num_members += len(item.members)
        original = _next_original(check, item.key, originals, quarantined)
        chosen = in_sample(decode_share, settings.seed, "verify", check.shard, item.key)
        _compare_members(check, item, original, settings)
        if chosen:
            compare_pictures(check, item, original, settings)
    _next_original(check, None, originals, quarantined)
    return num_members


def _next_original(
    check: ShardCheck, key: str | None, originals: Iterator[Sample] | None, quarantined: set[str]
) -> Sample | None:
    """The original of `key`; only quarantined samples may be skipped on the way. key None: go to the end."""
    if originals is None:
        return None
    for original in originals:
        if original.key == key:
            return original
        if original.key not in quarantined:
            check.fail(original.key, "is in the input, but neither in the output nor in quarantine")
    if key is not None:
        check.fail(key, "is not in the input, or out of order")
    return None


def _compare_members(check: ShardCheck, ours: Sample, original: Sample | None, settings: VerifySettings) -> None:
    """Sidecars must be of the permitted kinds and unchanged."""
    try:
        image = image_suffix(ours, settings.keep_sidecar)
        check_sidecars(ours, image, settings.keep_sidecar)
        if original is None:
            return
        their_image = image_suffix(original, settings.keep_sidecar)
    except SampleError as error:
        check.fail(ours.key, str(error))
        return
    for suffix, data in original.members.items():
        if suffix != their_image and ours.members.get(suffix) != data:
            check.fail(ours.key, f"member {suffix} differs from the input")
    if len(ours.members) != len(original.members):
        check.fail(ours.key, f"has members {sorted(ours.members)}, but the input has {sorted(original.members)}")
    if ours.members[image] == original.members[their_image]:
        check.fail(ours.key, "the image is unprotected: its bytes are identical to the input's")


def compare_pictures(check: ShardCheck, ours: Sample, original: Sample | None, settings: VerifySettings) -> None:
    """Decode an image and its original, if any; record the largest change, and any mismatch of shape or bound."""
    try:
        suffix = image_suffix(ours, settings.keep_sidecar)
        picture = decode(ours.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)
        check.num_decoded += 1
        if original is None:
            return
        suffix = image_suffix(original, settings.keep_sidecar)
        before = decode(original.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)
    except SampleError as error:
        check.fail(ours.key, f"cannot be decoded ({error})")
        return
    if settings.size == "224":
        before = resize_and_crop(before)
    if picture.pixels.shape != before.pixels.shape:
        check.fail(
            ours.key, f"is {picture.pixels.shape}, but the input is {before.pixels.shape} (height, width, channels)"
        )
        return
    largest = int(np.abs(picture.pixels.astype(np.int16) - before.pixels.astype(np.int16)).max())
    check.max_abs_delta = max(check.max_abs_delta, largest)
    if largest == 0 and ours.members != original.members:  # of equal files it has been said already
        check.fail(ours.key, "the image is unprotected: its pixels are those of the input")
    if not picture.is_lossy:  # so the bound holds for the decoded file
        check.num_exact += 1
        check.max_exact_delta = max(check.max_exact_delta, largest)
        if largest > levels_of(settings.epsilon):
            check.fail(ours.key, f"a pixel differs by {largest} levels; epsilon allows {levels_of(settings.epsilon)}")


def _counts(check: ShardCheck, expected: Expected, num_members: int) -> dict[str, tuple[object, object]]:
    return {
        "samples": (check.num_samples, expected.num_samples),
        "members": (num_members, expected.num_members),
    }


def _compare_counts(check: ShardCheck, counts: dict[str, tuple[object, object]]) -> None:
    for what, (actual, said) in counts.items():
        if said is not None and actual != said:
            check.fail("", f"{what}: found {actual}, but the record says {said}")
