"""Apply a protection to samples: each one is protected, or rejected with a reason."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.delta import LaidDelta
from pipeline.deltas.survival import coding_for, survival
from pipeline.errors import Reason, SampleError
from pipeline.hashing import in_sample
from pipeline.pictures.members import Opened, check_sidecars, extension, image_suffix, open_sample, rejection_of
from pipeline.pictures.picture import decode, encode, stored
from pipeline.records import Rejection, Sample
from pipeline.settings import ApplySettings, jpeg_quality
from pipeline.shards.samples import SampleWriter

REREAD = 1 / 32  # share of pictures that are decoded again, to see what is left of their deltas
_FINE_QUALITY = 75  # of a JPEG; steps of a coarser one can swallow a whole delta
_Item = TypeVar("_Item")


class DeltaSource(Protocol):
    """Anything that can give the delta of a sample."""

    @property
    def epsilon(self) -> float:
        """Bound on |delta|, pixel units."""

    @property
    def per_sample(self) -> bool:
        """True if the delta depends on the key, so that caching it is pointless."""

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """int16 [height, width, 3], whole 8-bit levels within epsilon."""


class LaidDeltas:
    """Deltas of a source, resized to pictures of any size and orientation, with a cache of the most recent.

    max_bytes  size of the cache; not used if every sample has its own delta
    """

    def __init__(self, source: DeltaSource, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.epsilon = source.epsilon
        self._source = source
        self._left = max_bytes
        self._kept: OrderedDict[tuple[int, int, int, int], LaidDelta] = OrderedDict()

    def delta_for(self, cluster: int, key: str, height: int, width: int, orientation: int = 1) -> LaidDelta:
        """The source's delta for an upright picture of this size, in the orientation of its stored pixels."""
        place = (cluster, height, width, orientation)
        kept = self._kept.get(place)
        if kept is not None:
            self._kept.move_to_end(place)
            return kept
        laid = LaidDelta(stored(self._source.delta_for(cluster, key, height, width), orientation))
        if self._source.per_sample:
            return laid
        self._left -= laid.nbytes
        self._kept[place] = laid
        while self._left < 0:
            _, oldest = self._kept.popitem(last=False)
            self._left += oldest.nbytes
        return laid


@dataclass(frozen=True)
class ProtectedSample:
    """A sample with its delta added, and the cost of doing so."""

    sample: Sample
    max_abs_delta: int  # largest |x' - x| before encoding, in 8-bit levels
    input_image_bytes: int
    output_image_bytes: int
    seconds: Mapping[str, float]  # decode, delta, add, encode -> wall seconds
    is_finer: bool = False  # a JPEG written with finer steps or more colour than it came with, for the delta's sake
    survival: float | None = None  # share of the delta left in the file; None if it was not read again


@dataclass(frozen=True)
class ShardOutcome:
    """The outcome of a shard: every sample is either protected or rejected, never both."""

    num_protected: int
    rejections: tuple[Rejection, ...]
    clusters: Mapping[int, int]  # cluster -> samples protected with its delta
    max_abs_delta: int
    input_image_bytes: int
    output_image_bytes: int
    seconds: Mapping[str, float]  # stage -> wall seconds
    num_finer: int = 0  # JPEGs written with finer steps or more colour than they came with
    num_reread: int = 0  # pictures decoded again
    survival: float = 0.0  # sum of the shares of their deltas that were left

    @property
    def num_quarantined(self) -> int:
        return len(self.rejections)

    @property
    def quarantine(self) -> dict[str, int]:
        """Reason -> number of rejections."""
        return dict(sorted(Counter(rejection.reason.value for rejection in self.rejections).items()))


def protect_sample(
    sample: Sample, deltas: LaidDeltas, cluster: int, *, settings: ApplySettings, reread: float = REREAD
) -> ProtectedSample:
    """Add the delta of its cluster to a sample's image; all other members keep their bytes and their order.

    reread  share of samples, chosen by the hash of their keys, whose files are decoded again
    Raises SampleError if it cannot be protected, PromiseError if the bound does not hold.
    """
    opened = open_sample(sample, settings=settings)
    started = time.perf_counter()
    laid = deltas.delta_for(cluster, sample.key, *opened.picture.upright_size, opened.picture.orientation)
    spent = time.perf_counter() - started
    return close_sample(opened, laid, deltas.epsilon, settings=settings, delta_seconds=spent, reread=reread)


def check_writable(sample: Sample, settings: ApplySettings) -> None:
    """Raise SampleError for a sample that could not be protected, whatever its delta."""
    encode(open_sample(sample, settings=settings).picture, how=settings.encode, metadata=settings.metadata)


def close_sample(
    opened: Opened,
    laid: LaidDelta,
    epsilon: float,
    *,
    settings: ApplySettings,
    delta_seconds: float = 0.0,
    reread: float = REREAD,
) -> ProtectedSample:
    """Add a delta to an opened image and encode it as the settings say.

    reread  as for protect_sample

    Raises SampleError if it cannot be encoded or no pixel changes, also when coded coarsely; PromiseError if the bound
    does not hold.
    """
    marks = [time.perf_counter()]
    picture, source = opened.picture, opened.sample.members[opened.suffix]
    pixels, largest = laid.added_to(picture.pixels, epsilon)
    if largest == 0:
        raise SampleError(
            Reason.UNCHANGED, "its delta changes no pixel, as happens to some tiny or single-coloured pictures"
        )
    marks.append(time.perf_counter())
    coding = picture.coding if settings.encode == "same" else None
    if coding is not None:
        coding = coding_for(laid, coding)
    changed = replace(picture, pixels=pixels, coding=coding)
    encoded, ending = encode(changed, how=settings.encode, metadata=settings.metadata)
    left = None
    is_coarse = (jpeg_quality(settings.encode) or _FINE_QUALITY) < _FINE_QUALITY
    if is_coarse or in_sample(reread, 0, "reread", opened.sample.key):
        again = decode(encoded, max_pixels=settings.max_pixels, suffix=opened.suffix).pixels
        if np.array_equal(again, picture.pixels):
            raise SampleError(Reason.UNCHANGED, f"--encode {settings.encode} leaves nothing of its delta")
        left = survival(picture.pixels, pixels, again)
    marks.append(time.perf_counter())
    renamed = _renamed(opened.suffix, ending)
    taken = {name.casefold() for name in opened.sample.members if name != opened.suffix}
    if renamed.casefold() in taken:  # by a sidecar that --keep-sidecar passes on
        why = f"with --encode {settings.encode} the image would be called {renamed}, as a sidecar of it is"
        raise SampleError(Reason.DUPLICATE_MEMBER, why)
    members = {
        renamed if name == opened.suffix else name: encoded if name == opened.suffix else data
        for name, data in opened.sample.members.items()
    }
    seconds = {"decode": opened.seconds, "delta": delta_seconds}
    seconds |= {"add": marks[1] - marks[0], "encode": marks[2] - marks[1]}
    done = Sample(opened.sample.key, members)
    is_finer = coding is not None and coding != picture.coding
    return ProtectedSample(done, largest, len(source), len(encoded), seconds, is_finer, left)


def _renamed(suffix: str, ending: str | None) -> str:
    """`suffix` with the extension of the new format; unchanged if it already fits."""
    old = extension(suffix)
    if ending is None or old == ending or (old, ending) == ("jpeg", "jpg"):
        return suffix
    return suffix[: len(suffix) - len(old)] + ending


def protect_shard(
    samples: Iterable[Sample | Rejection],
    writer: SampleWriter,
    deltas: LaidDeltas,
    clusters: Mapping[str, int],
    *,
    settings: ApplySettings,
) -> ShardOutcome:
    """Protect and write samples one at a time; only counts and rejections are kept in memory.

    clusters  key -> cluster; a sample without one is rejected, because it could not be embedded
    Raises PromiseError if a bound does not hold; the shard must not be published then.
    """
    return write_protected(_one_by_one(samples, deltas, clusters, settings), writer)


def _one_by_one(
    samples: Iterable[Sample | Rejection], deltas: LaidDeltas, clusters: Mapping[str, int], settings: ApplySettings
) -> Iterator[tuple[ProtectedSample, int] | Rejection]:
    for item in samples:
        if isinstance(item, Rejection):
            yield item
            continue
        try:
            cluster = cluster_of(item, clusters, settings)
            done = protect_sample(item, deltas, cluster, settings=settings)
        except SampleError as error:
            yield rejection_of(item, error)
            continue
        yield done, cluster


def write_protected(results: Iterable[tuple[ProtectedSample, int] | Rejection], writer: SampleWriter) -> ShardOutcome:
    """Write protected samples, each with its cluster, and count outcomes; rejections are kept.

    Time outside a sample's stages counts as reading.
    """
    rejections: list[Rejection] = []
    used: Counter[int] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    largest = bytes_in = bytes_out = finer = 0
    left: list[float] = []
    for result in _timed(results, seconds):
        if isinstance(result, Rejection):
            rejections.append(result)
            continue
        done, cluster = result
        start = time.perf_counter()
        writer.write(done.sample)
        seconds["write"] += time.perf_counter() - start
        for stage, spent in done.seconds.items():
            seconds[stage] += spent
            seconds["read"] -= spent
        used[cluster] += 1
        largest = max(largest, done.max_abs_delta)
        bytes_in += done.input_image_bytes
        bytes_out += done.output_image_bytes
        finer += done.is_finer
        if done.survival is not None and math.isfinite(done.survival):
            left.append(done.survival)
    seconds["read"] = max(0.0, seconds["read"])
    return ShardOutcome(
        sum(used.values()),
        tuple(rejections),
        dict(sorted(used.items())),
        largest,
        bytes_in,
        bytes_out,
        dict(seconds),
        finer,
        len(left),
        math.fsum(left),
    )


def _timed(results: Iterable[_Item], seconds: defaultdict[str, float]) -> Iterator[_Item]:
    """Pass items through and add the time spent waiting for each to seconds["read"]."""
    iterator = iter(results)
    while True:
        start = time.perf_counter()
        item = next(iterator, None)
        seconds["read"] += time.perf_counter() - start
        if item is None:
            return
        yield item


def cluster_of(sample: Sample, clusters: Mapping[str, int], settings: ApplySettings) -> int:
    """The cluster of a sample that was embedded. Raises SampleError if it was not."""
    cluster = clusters.get(sample.key)
    if cluster is None:
        suffix = image_suffix(sample, settings.keep_sidecar)
        check_sidecars(sample, suffix, settings.keep_sidecar)
        decode(
            sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix
        )  # raises the more specific reason, if any
        raise SampleError(Reason.UNDECODABLE, "the sample was not embedded, so it has no cluster")
    return cluster
