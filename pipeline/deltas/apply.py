"""A protection and a sample -> the protected sample, or the reason why there is none."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.delta import LaidDelta
from pipeline.errors import Reason, SampleError
from pipeline.pictures.members import check_sidecars, extension, image_suffix, rejection_of
from pipeline.pictures.picture import Picture, decode, encode, resize_and_crop, stored
from pipeline.records import Rejection, Sample
from pipeline.settings import ApplySettings
from pipeline.shards.tar import ShardWriter

_Item = TypeVar("_Item")


class DeltaSource(Protocol):
    """Whatever answers: which delta for this sample?"""

    @property
    def epsilon(self) -> float:
        """Bound on |delta|, pixel units."""

    @property
    def per_sample(self) -> bool:
        """True if the answer depends on the key, so that keeping it is of no use."""

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """int16 [height, width, 3], whole 8-bit levels within epsilon."""


class LaidDeltas:
    """Deltas of a source, laid for pictures of any size and orientation; the most recent ones are kept.

    max_bytes  of what is kept; nothing is where every sample has a delta of its own
    """

    def __init__(self, source: DeltaSource, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.epsilon = source.epsilon
        self._source = source
        self._left = max_bytes
        self._kept: OrderedDict[tuple[int, int, int, int], LaidDelta] = OrderedDict()

    def delta_for(self, cluster: int, key: str, height: int, width: int, orientation: int = 1) -> LaidDelta:
        """The source's delta for an upright picture of this size, in the layout of its stored pixels."""
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
    """A sample whose image carries its delta, and what that cost."""

    sample: Sample
    max_abs_delta: int  # largest |x' - x| before encoding, in 8-bit levels
    input_image_bytes: int
    output_image_bytes: int
    seconds: Mapping[str, float]  # decode, delta, add, encode -> wall seconds


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard's samples: every one of them is counted in exactly one of the two numbers."""

    num_protected: int
    rejections: tuple[Rejection, ...]
    clusters: Mapping[int, int]  # cluster -> samples protected with its delta
    max_abs_delta: int
    input_image_bytes: int
    output_image_bytes: int
    seconds: Mapping[str, float]  # stage -> wall seconds

    @property
    def num_quarantined(self) -> int:
        return len(self.rejections)

    @property
    def quarantine(self) -> dict[str, int]:
        """Reason -> number of rejections."""
        return dict(sorted(Counter(rejection.reason.value for rejection in self.rejections).items()))


@dataclass(frozen=True)
class Opened:
    """A sample whose image was decoded, and the time that it took."""

    sample: Sample
    suffix: str
    picture: Picture
    seconds: float


def open_sample(sample: Sample, *, settings: ApplySettings) -> Opened:
    """The sample with its image decoded, at the size that it will be written in.

    Raises SampleError, also for a sidecar that may not leave as it is.
    """
    started = time.perf_counter()
    suffix = image_suffix(sample, settings.keep_sidecar)
    check_sidecars(sample, suffix, settings.keep_sidecar)
    picture = decode(sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)
    if settings.size == "224":
        picture = resize_and_crop(picture)
    return Opened(sample, suffix, picture, time.perf_counter() - started)


def protect_sample(sample: Sample, deltas: LaidDeltas, cluster: int, *, settings: ApplySettings) -> ProtectedSample:
    """The sample with the delta of its cluster in its image; all other members to the byte, in their order.

    Raises SampleError if it cannot be protected, PromiseError if the bound does not hold.
    """
    opened = open_sample(sample, settings=settings)
    started = time.perf_counter()
    laid = deltas.delta_for(cluster, sample.key, *opened.picture.upright_size, opened.picture.orientation)
    spent = time.perf_counter() - started
    return close_sample(opened, laid, deltas.epsilon, settings=settings, delta_seconds=spent)


def close_sample(
    opened: Opened, laid: LaidDelta, epsilon: float, *, settings: ApplySettings, delta_seconds: float = 0.0
) -> ProtectedSample:
    """Add a delta to an opened image and encode it as the settings say.

    Raises SampleError if it cannot be encoded, PromiseError if the bound does not hold.
    """
    marks = [time.perf_counter()]
    picture, source = opened.picture, opened.sample.members[opened.suffix]
    pixels, largest = laid.added_to(picture.pixels, epsilon)
    marks.append(time.perf_counter())
    encoded, ending = encode(replace(picture, pixels=pixels), how=settings.encode, metadata=settings.metadata)
    marks.append(time.perf_counter())
    # no other member can have the new name: it would have been a second image
    renamed = _renamed(opened.suffix, ending)
    members = {
        renamed if name == opened.suffix else name: encoded if name == opened.suffix else data
        for name, data in opened.sample.members.items()
    }
    seconds = {"decode": opened.seconds, "delta": delta_seconds}
    seconds |= {"add": marks[1] - marks[0], "encode": marks[2] - marks[1]}
    return ProtectedSample(Sample(opened.sample.key, members), largest, len(source), len(encoded), seconds)


def _renamed(suffix: str, ending: str | None) -> str:
    """`suffix` with the extension that the new bytes need; as it is if it fits already."""
    old = extension(suffix)
    if ending is None or old == ending or (old, ending) == ("jpeg", "jpg"):
        return suffix
    return suffix[: len(suffix) - len(old)] + ending


def protect_shard(
    samples: Iterable[Sample | Rejection],
    writer: ShardWriter,
    deltas: LaidDeltas,
    clusters: Mapping[str, int],
    *,
    settings: ApplySettings,
) -> ShardOutcome:
    """Protect sample after sample and write them; nothing but counts and rejections is kept.

    clusters  key -> cluster. A sample without one is rejected: it could not be embedded.
    Raises PromiseError if a bound does not hold; nothing of the shard may be published then.
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


def write_protected(results: Iterable[tuple[ProtectedSample, int] | Rejection], writer: ShardWriter) -> ShardOutcome:
    """Write protected samples, each with its cluster, and count what became of all; rejections are kept.

    The time that is in no stage of a sample was spent reading.
    """
    rejections: list[Rejection] = []
    used: Counter[int] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    largest = bytes_in = bytes_out = 0
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
    seconds["read"] = max(0.0, seconds["read"])
    return ShardOutcome(
        sum(used.values()),
        tuple(rejections),
        dict(sorted(used.items())),
        largest,
        bytes_in,
        bytes_out,
        dict(seconds),
    )


def _timed(results: Iterable[_Item], seconds: defaultdict[str, float]) -> Iterator[_Item]:
    """The same; the time that it takes to get them is added to seconds["read"]."""
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
        decode(sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)  # for the better reason
        raise SampleError(Reason.UNDECODABLE, "the sample was not embedded, so it has no cluster")
    return cluster
