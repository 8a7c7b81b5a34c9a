"""Features of one shard: samples are decoded in threads ahead of the surrogate, in micro-batches of bounded size."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SampleError
from pipeline.pictures.members import check_sidecars, image_suffix
from pipeline.pictures.picture import decode_rgb
from pipeline.profile import StepClock
from pipeline.records import Features, Rejection, Sample
from pipeline.surrogates.surrogate import Surrogate

PIXELS_AHEAD = 32_000_000  # limit on decoded pixels waiting for the surrogate, and per micro-batch
BYTES_AHEAD = 64 * 1024 * 1024  # encoded bytes read per chunk

Pixels = NDArray[np.uint8]
Outcome = tuple[str, Pixels] | Rejection


@dataclass
class EmbedSeconds:
    """Where a shard's time went.

    read    seconds in read-ahead threads, summed
    decode  seconds in decoder threads, summed
    steps   seconds in the caller's thread: wait (for pictures), copy (to the device), resize, model
    """

    read: float = 0.0
    decode: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)


def embed_shard(
    samples: Iterable[Sample | Rejection],
    surrogate: Surrogate,
    *,
    shard: str,
    batch_size: int,
    threads: int,
    max_pixels: int,
    keep_sidecar: Collection[str] = (),
    exact_clock: bool = False,
) -> tuple[Features, list[Rejection], EmbedSeconds]:
    """Features of a shard's usable samples and rejections of the others, both in input order.

    exact_clock  synchronise with the GPU after every step, so that each is charged its own time; slightly slower
    Apart from the features, memory does not grow with the shard: samples and decoded pictures of about two
    micro-batches are held, each of at most `batch_size` pictures and PIXELS_AHEAD pixels (or one picture). Exceptions
    from `samples` propagate.
    """
    seconds = EmbedSeconds()
    clock = surrogate.clock(exact=exact_clock)
    keys: list[str] = []
    blocks: list[NDArray[np.float16]] = [np.zeros((0, surrogate.dimension), np.float16)]
    rejections: list[Rejection] = []
    decoder = _Decoder(surrogate.resize, max_pixels, seconds, keep_sidecar)
    batches = _batches(decoder.decoded(samples, batch_size, threads), rejections, batch_size)
    while batch := _next(batches, clock):
        keys += [key for key, _ in batch]
        blocks.append(surrogate.embed_pictures([pixels for _, pixels in batch], clock).astype(np.float16))
    seconds.steps = dict(clock.seconds)
    return Features(shard, tuple(keys), np.concatenate(blocks)), rejections, seconds


def _next(batches: Iterator[list[tuple[str, Pixels]]], clock: StepClock) -> list[tuple[str, Pixels]] | None:
    with clock.step("wait"):
        return next(batches, None)


def _batches(
    outcomes: Iterable[Outcome], rejections: list[Rejection], batch_size: int
) -> Iterator[list[tuple[str, Pixels]]]:
    """Micro-batches, bounded by count and by pixels; rejections are collected separately."""
    batch: list[tuple[str, Pixels]] = []
    num_pixels = 0
    for outcome in outcomes:
        if isinstance(outcome, Rejection):
            rejections.append(outcome)
            continue
        if batch and num_pixels + _num_pixels(outcome) > PIXELS_AHEAD:
            yield batch
            batch, num_pixels = [], 0
        batch.append(outcome)
        num_pixels += _num_pixels(outcome)
        if len(batch) == batch_size:
            yield batch
            batch, num_pixels = [], 0
    if batch:
        yield batch


def _num_pixels(outcome: Outcome) -> int:
    return 0 if isinstance(outcome, Rejection) else outcome[1].shape[0] * outcome[1].shape[1]


class _Decoder:
    """Decodes samples in threads, a limited way ahead of the consumer, preserving order."""

    def __init__(self, at_least: int, max_pixels: int, seconds: EmbedSeconds, keep: Collection[str]) -> None:
        self._at_least, self._max_pixels, self._seconds, self._keep = at_least, max_pixels, seconds, keep
        self._changed = threading.Condition()
        self._pixels_waiting = 0
        self._next = 0  # index of the outcome that is consumed next
        self._stopped = False

    def decoded(self, samples: Iterable[Sample | Rejection], batch_size: int, threads: int) -> Iterator[Outcome]:
        waiting: deque[Future[Outcome]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for number, item in enumerate(self._read(samples, batch_size)):
                    waiting.append(pool.submit(self._decode, number, item))
                    if len(waiting) > batch_size + threads:
                        yield self._given(waiting.popleft().result())
                while waiting:
                    yield self._given(waiting.popleft().result())
            finally:
                self._stop()
                pool.shutdown(cancel_futures=True)

    def _read(self, samples: Iterable[Sample | Rejection], count: int) -> Iterator[Sample | Rejection]:
        """The samples, read one chunk ahead in a separate thread."""
        source = iter(samples)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._chunk, source, count)
            while chunk := ahead.result():
                ahead = reader.submit(self._chunk, source, count)
                yield from chunk

    def _chunk(self, source: Iterator[Sample | Rejection], count: int) -> list[Sample | Rejection]:
        start = time.perf_counter()
        chunk: list[Sample | Rejection] = []
        size = 0
        for item in islice(source, count):
            chunk.append(item)
            size += sum(map(len, item.members.values())) if isinstance(item, Sample) else 0
            if size >= BYTES_AHEAD:
                break
        self._seconds.read += time.perf_counter() - start
        return chunk

    def _decode(self, number: int, item: Sample | Rejection) -> Outcome:
        """Wait until there is room, then decode; the next outcome to be consumed never waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._pixels_waiting < PIXELS_AHEAD or number == self._next or self._stopped)
        start = time.perf_counter()
        outcome = item if isinstance(item, Rejection) else self._outcome(item)
        with self._changed:
            self._seconds.decode += time.perf_counter() - start
            self._pixels_waiting += _num_pixels(outcome)
        return outcome

    def _outcome(self, sample: Sample) -> Outcome:
        member = ""
        try:
            member = image_suffix(sample, self._keep)
            check_sidecars(sample, member, self._keep)
            data = sample.members[member]
            pixels = decode_rgb(data, at_least=self._at_least, max_pixels=self._max_pixels, suffix=member)
            return sample.key, pixels
        except SampleError as error:
            return Rejection(sample.key, f"{sample.key}.{member}" if member else "", error.reason, error.detail)

    def _given(self, outcome: Outcome) -> Outcome:
        with self._changed:
            self._pixels_waiting -= _num_pixels(outcome)
            self._next += 1
            self._changed.notify_all()
        return outcome

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
