"""A protection and a sample -> the protected sample, or the reason why there is none."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.delta import Steps, add_measured, add_steps
from pipeline.errors import SampleError
from pipeline.padded import whole_of
from pipeline.picture import DECODED, Picture, decode, encode, kind_of, resize_and_crop
from pipeline.records import Reason, Rejection, Sample
from pipeline.settings import Settings
from pipeline.tar import ShardWriter

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp"))
_OTHER_PICTURES = frozenset(
    ("tif", "tiff", "gif", "bmp", "heic", "heif", "avif", "jp2", "j2k", "jxl", "ico", "jpe", "jfif", "mpo", "psd")
    + ("exr", "dng", "cr2", "nef", "arw", "mp4", "mov", "webm", "mkv", "avi")
)


_Form = TypeVar("_Form", Steps, NDArray[np.int16])


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
    """A DeltaSource that remembers the deltas it laid most recently, up to `max_bytes` of them."""

    def __init__(self, source: DeltaSource, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.epsilon = source.epsilon
        self.per_sample = source.per_sample
        self._source = source
        self._left = max_bytes
        self._laid: OrderedDict[tuple[object, int, int, int], Any] = OrderedDict()

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        """As the source's own answer; read-only where it is remembered."""
        if self.per_sample:
            return self._source.delta_for(cluster, key, height, width)
        return self._remembered(_read_only, cluster, key, height, width)

    def steps_for(self, cluster: int, key: str, height: int, width: int) -> Steps:
        """The same delta, taken apart for padded pixels."""
        if self.per_sample:
            return Steps(self._source.delta_for(cluster, key, height, width))
        return self._remembered(Steps, cluster, key, height, width)

    def _remembered(
        self, form: Callable[[NDArray[np.int16]], _Form], cluster: int, key: str, height: int, width: int
    ) -> _Form:
        place = (form, cluster, height, width)
        found: _Form | None = self._laid.get(place)
        if found is not None:
            self._laid.move_to_end(place)
            return found
        found = form(self._source.delta_for(cluster, key, height, width))
        self._left -= found.nbytes
        self._laid[place] = found
        while self._left < 0:
            _, oldest = self._laid.popitem(last=False)
            self._left += oldest.nbytes
        return found


def _read_only(laid: NDArray[np.int16]) -> NDArray[np.int16]:
    laid = laid.view()
    laid.flags.writeable = False
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


def image_suffix(sample: Sample) -> str:
    """Suffix of the one member that is the sample's image.

    Raises SampleError if there is none or several, or if any other member is a picture or a video as well: it
    would leave without protection.
    """
    pictures = [suffix for suffix in sample.members if _extension(suffix) in IMAGE_SUFFIXES]
    if len(pictures) > 1:
        raise SampleError(Reason.SEVERAL_IMAGES, f"members {', '.join(pictures)}")
    for suffix, data in sample.members.items():
        if suffix in pictures:
            continue
        kind = kind_of(data)
        if pictures and kind in DECODED:
            raise SampleError(Reason.SEVERAL_IMAGES, f"member {suffix} is a picture too ({kind})")
        if kind is not None or _extension(suffix) in _OTHER_PICTURES:
            raise SampleError(
                Reason.UNSUPPORTED_FORMAT, f"member {suffix} is a picture that cannot be protected under this name"
            )
    if not pictures:
        raise SampleError(Reason.NO_IMAGE, f"none of {', '.join(sample.members)} is jpg, jpeg, png or webp")
    return pictures[0]


def _extension(suffix: str) -> str:
    return suffix.rpartition(".")[2].lower()


def protect_sample(sample: Sample, protection: DeltaSource, cluster: int, *, settings: Settings) -> ProtectedSample:
    """The sample with the delta of its cluster in its image; all other members to the byte, in their order.

    Raises SampleError if it cannot be protected, PromiseError if the bound does not hold.
    """
    suffix = image_suffix(sample)
    source = sample.members[suffix]
    marks = [time.perf_counter()]
    picture = decode(source, max_pixels=settings.max_pixels, suffix=suffix)
    if settings.size == "224":
        picture = resize_and_crop(picture)
    marks.append(time.perf_counter())
    whole = whole_of(picture.pixels)
    place = (cluster, sample.key, *picture.pixels.shape[:2])
    if whole is None:
        laid = protection.delta_for(*place)
        marks.append(time.perf_counter())
        pixels, largest = add_measured(picture.pixels, laid, protection.epsilon)
    else:
        steps = (
            protection.steps_for(*place) if isinstance(protection, LaidDeltas) else Steps(protection.delta_for(*place))
        )
        marks.append(time.perf_counter())
        pixels, largest = add_steps(whole, steps, protection.epsilon)
    marks.append(time.perf_counter())
    protected = Picture(pixels, picture.format, picture.exif, picture.icc, picture.xmp)
    encoded, extension = encode(protected, how=settings.encode, metadata=settings.metadata)
    marks.append(time.perf_counter())
    # no other member can have the new name: it would have been a second image
    renamed = _renamed(suffix, extension)
    members = {
        renamed if name == suffix else name: encoded if name == suffix else data
        for name, data in sample.members.items()
    }
    stages = ("decode", "delta", "add", "encode")
    seconds = {stage: end - start for stage, start, end in zip(stages, marks, marks[1:], strict=False)}
    return ProtectedSample(Sample(sample.key, members), largest, len(source), len(encoded), seconds)


def _renamed(suffix: str, extension: str | None) -> str:
    """`suffix` with the extension that the new bytes need; as it is if it fits already."""
    old = _extension(suffix)
    if extension is None or old == extension or (old, extension) == ("jpeg", "jpg"):
        return suffix
    return suffix[: len(suffix) - len(old)] + extension


def protect_shard(
    samples: Iterable[Sample | Rejection],
    writer: ShardWriter,
    protection: DeltaSource,
    clusters: Mapping[str, int],
    *,
    settings: Settings,
) -> ShardOutcome:
    """Protect sample after sample and write them; nothing but counts and rejections is kept.

    clusters  key -> cluster. A sample without one is rejected: it could not be embedded.
    Raises PromiseError if a bound does not hold; nothing of the shard may be published then.
    """
    rejections: list[Rejection] = []
    used: Counter[int] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    largest = bytes_in = bytes_out = 0
    for item in _timed(samples, seconds):
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        try:
            done = protect_sample(item, protection, _cluster_of(item, clusters, settings), settings=settings)
        except SampleError as error:
            rejections.append(_rejection(item, error))
            continue
        start = time.perf_counter()
        writer.write(done.sample)
        seconds["write"] += time.perf_counter() - start
        for stage, spent in done.seconds.items():
            seconds[stage] += spent
        used[clusters[item.key]] += 1
        largest = max(largest, done.max_abs_delta)
        bytes_in += done.input_image_bytes
        bytes_out += done.output_image_bytes
    return ShardOutcome(
        sum(used.values()),
        tuple(rejections),
        dict(sorted(used.items())),
        largest,
        bytes_in,
        bytes_out,
        dict(seconds),
    )


def _timed(samples: Iterable[Sample | Rejection], seconds: defaultdict[str, float]) -> Iterator[Sample | Rejection]:
    """The same samples; the time that it takes to get them is added to seconds["read"]."""
    iterator = iter(samples)
    while True:
        start = time.perf_counter()
        item = next(iterator, None)
        seconds["read"] += time.perf_counter() - start
        if item is None:
            return
        yield item


def _cluster_of(sample: Sample, clusters: Mapping[str, int], settings: Settings) -> int:
    cluster = clusters.get(sample.key)
    if cluster is None:
        suffix = image_suffix(sample)
        decode(sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)  # for the better reason
        raise SampleError(Reason.UNDECODABLE, "the sample was not embedded, so it has no cluster")
    return cluster


def _rejection(sample: Sample, error: SampleError) -> Rejection:
    """The quarantine's line for a sample; it names the image member where there is one."""
    pictures = [suffix for suffix in sample.members if _extension(suffix) in IMAGE_SUFFIXES]
    member = f"{sample.key}.{(pictures or list(sample.members))[0]}"
    return Rejection(sample.key, member, error.reason, error.detail)
