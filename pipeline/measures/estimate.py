"""How long a run will take, estimated from a few images measured on this machine."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.delta import lay, levels_of
from pipeline.deltas.load import AnyProtection
from pipeline.deltas.picture_deltas import PictureOpener
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork
from pipeline.deltas.samplewise.kinds import PER_PICTURE, PictureGenerator
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.errors import InputError, SampleError
from pipeline.fitting.fit import FitImages
from pipeline.fitting.fit_images import fit_bytes, picture_side
from pipeline.fitting.objective import PROXY_SIDES, delta_side
from pipeline.fitting.proxy_training import ProxyTraining, Schedule
from pipeline.hashing import numpy_rng
from pipeline.measures.cpus import available_cpus
from pipeline.pictures.members import image_suffix
from pipeline.pictures.picture import decode_rgb
from pipeline.records import Rejection, Sample, Shard
from pipeline.settings import DISTILLED_BATCH, LARGEST_EPSILON, ApplySettings, Settings, clusters_for
from pipeline.shards.samples import samples_of_all
from pipeline.shards.tar import read_samples
from pipeline.storage.store import Store
from pipeline.storage.streams import HashingReader
from pipeline.surrogates.surrogate import WHOLE_BATCH, Surrogate

MEASURED_IMAGES = 32
COUNTED_SAMPLES = 1000  # read at most to estimate bytes per sample; most are not decoded
_UNIVERSAL_IMAGES = 4  # a generator of 120 M parameters takes seconds for each
_FIXED_SECONDS = 60.0  # starting Ray and its workers four times
_TIMED_BATCH, _TIMED_STEPS = 512, 4  # for timing the proxy
_TRAINING = 3.0  # a training step takes about as long as so many passes
_PATCH_PIXELS = 1.0  # blur that gives a typical delta's signs their patch size


@dataclass(frozen=True)
class Estimate:
    """A prediction for the whole collection.

    images           number of images, extrapolated from bytes per sample
    sides            median (height, width) in pixels
    output_factor    size of the protected image files relative to the originals
    survival         mean share of the deltas that is left in them
    num_finer        JPEGs that had to be coded more finely than the originals, of the images measured
    embed            seconds per image of one process
    apply            seconds per image of one process
    fit              seconds of the whole fit in one process
    fit_bytes        memory of the images to fit on, in each process that fits; 0 without a fit
    fits             how many processes can share the fit: one for deltas that are fitted jointly
    makes_deltas     True if networks make a delta for each image while applying
    """

    images: int
    sides: tuple[int, int]
    output_factor: float
    clusters: int
    embed: float
    apply: float
    fit: float
    fit_bytes: int = 0
    makes_deltas: bool = False
    survival: float = 1.0
    num_finer: int = 0
    fits: int = 1

    def stage_seconds(self, workers: int) -> dict[str, float]:
        """Wall seconds of each stage with that many worker processes."""
        return {
            "embed": self.images * self.embed / workers,
            "cluster": 1e-4 * self.images / workers + 5,
            "fit": self.fit / min(workers, self.fits),
            "apply": self.images * self.apply / workers,
            "start-up": _FIXED_SECONDS,
        }

    def hours(self, workers: int, settings: Settings) -> tuple[float, float]:
        """GPU-hours and CPU-hours used by the stages with that many workers; a stage without a model uses no GPU."""
        seconds = self.stage_seconds(workers)
        on_gpus = ["embed", "fit", "apply"] if self.makes_deltas else ["embed", "fit"]
        on_gpus = ["apply"] if settings.method == "one-for-all" else on_gpus
        processes = {stage: min(workers, self.fits) if stage == "fit" else workers for stage in seconds}
        busy = {stage: spent * processes[stage] for stage, spent in seconds.items()}
        gpu = settings.gpus_per_worker * sum(busy[stage] for stage in on_gpus)
        return gpu / 3600, (sum(busy.values()) + busy["fit"] * (settings.fit_threads - 1)) / 3600


def estimate(
    samples: list[Sample],
    bytes_each: float,
    total_bytes: int,
    surrogate: Surrogate,
    settings: Settings,
    given: AnyProtection | None = None,
) -> Estimate:
    """Measure some images and extrapolate.

    samples      a few
    bytes_each   bytes per sample
    total_bytes  of all shards
    given        an existing protection to apply instead of fitting one
    Raises InputError if none of the images is usable.
    """
    threads = _threads_each(settings)
    if isinstance(given, UniversalProtection):  # embeds while it applies
        embed, universal = 0.0, _universal_seconds(samples, given, surrogate, settings, threads)
    else:
        embed, universal = _embed_seconds(samples, surrogate, settings, threads), 0.0
    has_colour = settings.plain or settings.method == "one-for-all"
    if given is not None and given.sample is not None:
        has_colour = given.sample.plain
    files = _protected(samples, settings, has_colour)
    apply, sides = files.seconds + universal, files.sides
    makes_deltas = given.sample is not None if given else _fits_networks(settings)
    if makes_deltas:
        side = given.sample.side if given and given.sample else _delta_side(settings, surrogate, sides)
        apply += _delta_seconds(replace(settings, fit_threads=threads), given.sample if given else None, side)
    images = max(len(samples), int(total_bytes / max(bytes_each, 1)))
    clusters = (
        len(given.clustering.centroids) if given else settings.clusters or clusters_for(images, settings.generator)
    )
    fit = _fit_seconds(images, sides, surrogate, settings, clusters)
    side = picture_side(settings, delta_side(settings, surrogate.input_size, [min(sides)]))
    memory = fit_bytes(min(images, settings.fit_images or images), side) if fit else 0
    fits = clusters if settings.optimise_through == "surrogate" else 1
    rest = (memory, makes_deltas, files.survival, files.num_finer, fits)
    return Estimate(images, sides, files.factor, clusters, embed, apply, fit, *rest)


def estimate_writing(
    samples: list[Sample], bytes_each: float, total_bytes: int, surrogate: Surrogate | None, settings: Settings
) -> Estimate:
    """As estimate, but for the fit, whose cost depends on a method that is unknown here.

    surrogate  None if nothing is embedded
    """
    embed = 0.0 if surrogate is None else _embed_seconds(samples, surrogate, settings, _threads_each(settings))
    files = _protected(samples, settings, has_colour=True)
    images = max(len(samples), int(total_bytes / max(bytes_each, 1)))
    predicted = Estimate(images, files.sides, files.factor, 0, embed, files.seconds, fit=0.0)
    return replace(predicted, survival=files.survival, num_finer=files.num_finer)


def first_usable(
    source: Store, shards: Sequence[Shard], *, max_member_bytes: int, use: Callable[[Sample], object]
) -> list[Sample]:
    """The first samples of a collection that can be used, or, if none of the first 1,000 can, the first ones.

    use  raises SampleError for a sample that cannot
    """
    usable: list[Sample] = []
    others: list[Sample] = []
    for item in islice(samples_of_all(source, shards, max_member_bytes=max_member_bytes), COUNTED_SAMPLES):
        if isinstance(item, Rejection):
            continue
        try:
            use(item)
            usable.append(item)
        except SampleError:
            others = [*others, item][:MEASURED_IMAGES]
        if len(usable) == MEASURED_IMAGES:
            break
    return usable or others


def count_samples(source: Store, shards: Sequence[Shard], *, max_member_bytes: int) -> int:
    """How many samples there are: exactly in units of loose images, about as many as bytes tell in shards."""
    loose = sum(len(shard.images) for shard in shards)
    tars = [shard for shard in shards if not shard.images]
    total = sum(shard.size for shard in tars)
    return loose + round(total / bytes_per_sample(source, tars, max_member_bytes=max_member_bytes) if total else 0)


def bytes_per_sample(source: Store, shards: Sequence[Shard], *, max_member_bytes: int) -> float:
    """Bytes of a sample in the first shard or unit that has any: of all its samples, or of the first 1,000 in a tar."""
    for shard in shards:
        if shard.images:
            return shard.size / len(shard.images)
        with source.open(shard.name) as stream:
            counted = HashingReader(stream)
            samples = read_samples(io.BufferedReader(counted, 1 << 16), max_member_bytes=max_member_bytes)
            count = sum(1 for _ in islice(samples, COUNTED_SAMPLES))
        if count:
            return (counted.size if count == COUNTED_SAMPLES else shard.size) / count
    return sum(shard.size for shard in shards)


def _threads_each(settings: ApplySettings) -> int:
    """Threads of one worker where all of a machine's CPUs are shared out."""
    cpus = available_cpus()
    return max(1, cpus // (settings.workers or cpus))


def _embed_seconds(samples: list[Sample], surrogate: Surrogate, settings: Settings, threads: int) -> float:
    pictures = []
    why: SampleError | str = "the shard is empty"
    started = time.perf_counter()
    for sample in samples:
        try:
            suffix = image_suffix(sample, settings.keep_sidecar)
            data = sample.members[suffix]
            pictures.append(decode_rgb(data, at_least=surrogate.resize, max_pixels=settings.max_pixels, suffix=suffix))
        except SampleError as error:
            why = error
    if not pictures:
        raise InputError(f"none of the first {len(samples)} samples can be protected; last error: {why}")
    decoded = time.perf_counter() - started
    with torch_threads(threads):
        surrogate.embed_pictures(pictures[:1])
        started = time.perf_counter()
        surrogate.embed_pictures(pictures)
        return (decoded + time.perf_counter() - started) / len(pictures)


def _universal_seconds(
    samples: list[Sample], given: UniversalProtection, surrogate: Surrogate, settings: Settings, threads: int
) -> float:
    """Seconds per image of decoding for surrogate and generator, and of one pass of both."""
    deltas = UniversalDeltas(given, surrogate, small_images=settings.small_images)
    opener = PictureOpener(settings, deltas, None)
    with torch_threads(threads):
        opened = [found for found in map(opener.open, samples[:_UNIVERSAL_IMAGES]) if not isinstance(found, Rejection)]
        if not opened:
            return 0.0  # what cannot be protected is said where files are measured
        requests = [request for _, request in opened]
        deltas.for_pictures(requests[:1])
        started = time.perf_counter()
        deltas.for_pictures(requests)
        return (time.perf_counter() - started) / len(requests)


class TypicalDeltas:
    """A delta at its bound everywhere whose signs form stripes and patches of a few pixels, like fitted ones.

    has_colour  other patches in each channel
    """

    per_sample = False

    def __init__(self, epsilon: float, side: int, *, has_colour: bool) -> None:
        self.epsilon = epsilon
        noise = numpy_rng(0, "typical-delta").normal(size=(3 if has_colour else 1, side, side))
        signs = np.sign(gaussian_filter(noise, (0, _PATCH_PIXELS, _PATCH_PIXELS)))
        self._levels = np.broadcast_to((levels_of(epsilon) * signs).astype(np.int8), (3, side, side))

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> Any:
        return lay(self._levels, height, width, self.epsilon)


@dataclass(frozen=True)
class _Files:
    """What came of protecting some images: seconds per image, median height and width, the rest as in Estimate."""

    seconds: float
    factor: float
    sides: tuple[int, int]
    survival: float
    num_finer: int


def _protected(samples: list[Sample], settings: Settings, has_colour: bool) -> _Files:
    deltas = LaidDeltas(TypicalDeltas(min(settings.epsilon, LARGEST_EPSILON), PROXY_SIDES[1], has_colour=has_colour))
    bytes_in = bytes_out = finer = 0
    seconds, sides, left = [], [], []
    for sample in samples:
        started = time.perf_counter()
        try:
            done = protect_sample(sample, deltas, 0, settings=settings, reread=1.0)
        except SampleError as error:
            why = error
            continue
        seconds.append(time.perf_counter() - started)
        bytes_in, bytes_out = bytes_in + done.input_image_bytes, bytes_out + done.output_image_bytes
        finer += done.is_finer
        left.append(1.0 if done.survival is None else done.survival)
        suffix = image_suffix(done.sample, settings.keep_sidecar)
        pixels = decode_rgb(
            done.sample.members[suffix], at_least=1 << 20, max_pixels=settings.max_pixels, suffix=suffix
        )
        sides.append(pixels.shape[:2])
    if not seconds:
        raise InputError(f"none of the first {len(samples)} samples can be protected; last error: {why}")
    height, width = (int(np.median([side[axis] for side in sides])) for axis in (0, 1))
    factor = bytes_out / max(bytes_in, 1)
    return _Files(float(np.mean(seconds)), factor, (height, width), float(np.nanmean(left)), finer)


def _fit_seconds(images: int, sides: tuple[int, int], surrogate: Surrogate, settings: Settings, clusters: int) -> float:
    """Number of image-steps in the fit times the time of one, measured here."""
    if settings.protection is not None or settings.generator == "texture":
        return 0.0
    fitted = min(images, settings.fit_images or images)
    settings = settings.for_images(fitted)
    if settings.optimise_through == "proxy":
        schedule = Schedule.of(fitted, settings.proxy_steps)
        seen = schedule.steps * schedule.batch
        side = _delta_side(settings, surrogate, sides)
        seconds = _proxy_seconds(side, settings)
        if settings.generator not in PER_PICTURE:
            return (seen + settings.steps * settings.batch_size) * seconds
        fit = seen * (settings.proxies + settings.robust_proxies) * seconds  # robust ones take two passes per step
        if settings.generator == "distilled":
            fit += settings.steps * DISTILLED_BATCH * (seconds + _TRAINING * _distilled_seconds(settings, side))
        return fit
    return clusters * settings.steps * min(settings.batch_size, fitted) * _pass_seconds(surrogate)


def _fits_networks(settings: Settings) -> bool:
    """Whether the run fits networks that make a delta for each image."""
    return settings.generator in PER_PICTURE and settings.protection is None


def _delta_side(settings: Settings, surrogate: Surrogate, sides: tuple[int, int]) -> int:
    return delta_side(settings, surrogate.input_size, [min(sides)])


def _delta_seconds(settings: Settings, given: PictureGenerator | None, side: int) -> float:
    """Seconds that the networks take for the delta of one image."""
    if given is not None:
        settings = replace(settings, plain=given.plain)
    if isinstance(given, DistilledGenerator) or (given is None and settings.generator == "distilled"):
        return _distilled_seconds(settings, side)
    return (given.steps if given is not None else settings.steps) * _proxy_seconds(side, settings)


def _distilled_seconds(settings: Settings, side: int) -> float:
    """Seconds per image of one pass of the network for distilled deltas, without its random draws."""
    network = DistilledNetwork(2, side, plain=settings.plain).eval()
    images, targets = torch.zeros(_TIMED_BATCH // 8, 3, side, side), torch.zeros(_TIMED_BATCH // 8, dtype=torch.long)
    with torch.no_grad(), torch_threads(settings.fit_threads):
        network(images, images[:, :1], targets)
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            network(images, images[:, :1], targets)
    return (time.perf_counter() - started) / (_TIMED_STEPS * len(images))


def _proxy_seconds(side: int, settings: Settings) -> float:
    """Seconds per image of one training step of the proxy; a delta step through it takes about as long."""
    pixels = torch.zeros((_TIMED_BATCH, 3, side, side), dtype=torch.uint8)
    images = FitImages(pixels, torch.arange(_TIMED_BATCH) % 2)
    with torch_threads(settings.fit_threads):
        training = ProxyTraining(
            images,
            2,
            colour_robust=not settings.plain,
            seed=settings.seed,
            device=torch.device("cpu"),
            least_steps=_TIMED_STEPS + 1,
        )
        training.advance()
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            training.advance()
        return (time.perf_counter() - started) / (_TIMED_STEPS * Schedule.of(_TIMED_BATCH, 1).batch)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pass_seconds(surrogate: Surrogate) -> float:
    """Seconds per image of a forward and backward pass through the surrogate: about three forward passes."""
    pictures = [np.zeros((surrogate.input_size, surrogate.input_size, 3), np.uint8)] * WHOLE_BATCH[
        surrogate.device.type
    ]
    surrogate.embed_pictures(pictures)
    started = time.perf_counter()
    surrogate.embed_pictures(pictures)
    return _TRAINING * (time.perf_counter() - started) / len(pictures)
