"""Deltas for pictures that no earlier stage has seen: embedded, sent to the nearest cluster, protected, in one pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.apply import LaidDeltas, Opened, ProtectedSample, close_sample, cluster_of, open_sample
from pipeline.deltas.delta import LaidDelta, lay
from pipeline.deltas.protection import Protection
from pipeline.deltas.sample_steps import SampleSteps
from pipeline.errors import SampleError
from pipeline.pictures.members import rejection_of
from pipeline.pictures.picture import decode_rgb, rgb_of, squeezed, stored
from pipeline.records import Rejection, Sample
from pipeline.settings import ApplySettings
from pipeline.surrogates.surrogate import Surrogate

PIXELS_AT_ONCE = 64_000_000  # of a batch: its decoded pictures are all held

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DeltaRequest:
    """One picture that needs a delta.

    small   uint8 [h, w, 3], what is embedded: the picture, perhaps decoded at a smaller scale; None if `cluster` is
            given
    height, width  of the upright picture
    square  uint8 [S, S, 3], all of the picture squeezed to the side that the deltas ask for; None if they ask for none
    cluster  where the picture was embedded and assigned before
    orientation  1 to 8: how the stored pixels are turned to be upright
    """

    key: str
    small: Pixels | None
    height: int
    width: int
    square: Pixels | None = None
    cluster: int | None = None
    orientation: int = 1

    def laid(self, levels: NDArray[np.int16]) -> LaidDelta:
        """The delta from its levels int16 [height, width, 3] for the upright picture."""
        return LaidDelta(stored(levels, self.orientation))


@dataclass(frozen=True)
class DeltaAnswer:
    """The delta of one picture.

    delta     in the layout of the stored pixels, within epsilon
    cluster   the nearest centroid; distance  how far it is: far beyond what was fitted means drift
    """

    delta: LaidDelta
    cluster: int
    distance: float


class PictureDeltas(Protocol):
    """Whatever answers: which deltas for these pictures?"""

    @property
    def epsilon(self) -> float:
        """Bound on |delta|, pixel units."""

    @property
    def at_least(self) -> int:
        """Shorter side in pixels that the pictures to be embedded must have, where the originals have it."""

    @property
    def side(self) -> int | None:
        """Side in pixels of the squares that deltas are made from; None if they do not depend on the picture."""

    def for_pictures(self, asked: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        """One answer each."""


class NearestDeltas:
    """The delta of the cluster whose centroid is nearest (Zhang et al. 2023): nothing is clustered again.

    Raises ConflictError if the surrogate is not the one that the protection was fitted with.
    """

    def __init__(self, protection: Protection, surrogate: Surrogate) -> None:
        protection.check_surrogate(surrogate.id)
        self.epsilon, self.at_least, self.side = protection.epsilon, surrogate.resize, None
        self._protection, self._surrogate, self._laid = protection, surrogate, LaidDeltas(protection)

    def for_pictures(self, asked: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        clusters, distances = nearest_clusters(asked, self._protection, self._surrogate)
        return [
            DeltaAnswer(
                self._laid.delta_for(cluster, one.key, one.height, one.width, one.orientation), cluster, distance
            )
            for one, cluster, distance in zip(asked, clusters, distances, strict=True)
        ]


class SampleDeltas:
    """A delta for each picture, made by steps on its own pixels towards the target of its cluster.

    surrogate  tells the cluster of pictures that come without one; None if they all have one
    Raises ConflictError if the surrogate is not the one that the protection was fitted with.
    """

    def __init__(self, protection: Protection, surrogate: Surrogate | None, device: str = "cpu") -> None:
        assert protection.sample is not None
        if surrogate is not None:
            protection.check_surrogate(surrogate.id)
        self.epsilon, self.at_least = protection.epsilon, surrogate.resize if surrogate is not None else 1
        self.side = protection.sample.side
        self._protection, self._surrogate = protection, surrogate
        self._steps = SampleSteps(protection.sample, protection.targets, protection.epsilon, device)

    def for_pictures(self, asked: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        clusters, distances = nearest_clusters(asked, self._protection, self._surrogate)
        squares = np.stack([one.square for one in asked if one.square is not None])
        levels, _ = self._steps.levels(squares, clusters, [one.key for one in asked])
        return [
            DeltaAnswer(one.laid(lay(own, one.height, one.width, self.epsilon)), cluster, distance)
            for one, own, cluster, distance in zip(asked, levels, clusters, distances, strict=True)
        ]


def nearest_clusters(
    asked: Sequence[DeltaRequest], protection: Protection, surrogate: Surrogate | None
) -> tuple[list[int], list[float]]:
    """Cluster and distance of each picture: as given, at distance nan, else those of the nearest centroid."""
    clusters = [-1 if one.cluster is None else one.cluster for one in asked]
    distances = [float("nan")] * len(asked)
    left = [row for row, one in enumerate(asked) if one.cluster is None]
    if left:
        assert surrogate is not None
        features = surrogate.embed_pictures([small for row in left if (small := asked[row].small) is not None])
        # as the stage `embed` stores them, so that one picture has one cluster whichever way it comes
        found = protection.clustering.assign(features.astype(np.float16))
        for row, cluster, distance in zip(left, *found, strict=True):
            clusters[row], distances[row] = int(cluster), float(distance)
    return clusters, distances


@dataclass(frozen=True)
class ProtectedPicture:
    """A sample whose image carries the delta that was chosen for it."""

    done: ProtectedSample
    cluster: int
    distance: float


def protect_pictures(
    samples: Iterable[Sample | Rejection],
    deltas: PictureDeltas,
    *,
    settings: ApplySettings,
    batch_size: int,
    threads: int = 1,
    clusters: Mapping[str, int] | None = None,
) -> Iterator[ProtectedPicture | Rejection]:
    """Every sample protected or rejected, in input order; read, embedded and encoded batch by batch.

    batch_size  pictures that are embedded at once; fewer if they have more than PIXELS_AT_ONCE pixels together
    threads     that decode and encode a batch
    clusters    key -> cluster; a sample without one is rejected. None: nothing was embedded before
    The first results come before the second batch is read. Raises PromiseError if a bound does not hold.
    """
    with ThreadPoolExecutor(threads) as pool:
        opener = _Opener(settings, deltas, clusters)
        for batch in _batches(samples, batch_size):
            opened = list(pool.map(opener.open, batch))
            usable = [one for one in opened if not isinstance(one, Rejection)]
            started = time.perf_counter()
            answers = deltas.for_pictures([asked for _, asked in usable]) if usable else []
            spent = (time.perf_counter() - started) / max(1, len(usable))
            closing = iter(
                [
                    pool.submit(_close, one, answer, deltas.epsilon, settings, spent)
                    for (one, _), answer in zip(usable, answers, strict=True)
                ]
            )
            for one in opened:
                yield one if isinstance(one, Rejection) else next(closing).result()


class _Opener:
    def __init__(self, settings: ApplySettings, deltas: PictureDeltas, clusters: Mapping[str, int] | None) -> None:
        self._settings, self._deltas, self._clusters = settings, deltas, clusters

    def open(self, item: Sample | Rejection) -> tuple[Opened, DeltaRequest] | Rejection:
        if isinstance(item, Rejection):
            return item
        try:
            cluster = None if self._clusters is None else cluster_of(item, self._clusters, self._settings)
            opened = open_sample(item, settings=self._settings)
            square = None if self._deltas.side is None else squeezed(opened.picture, self._deltas.side)
            small = self._small(opened) if cluster is None else None
            picture = opened.picture
            return opened, DeltaRequest(item.key, small, *picture.upright_size, square, cluster, picture.orientation)
        except SampleError as error:
            return rejection_of(item, error)

    def _small(self, opened: Opened) -> Pixels:
        """The picture as the stage `embed` sees it, from the file again only where that decodes it at another scale."""
        settings, at_least = self._settings, self._deltas.at_least
        small = rgb_of(opened.picture, at_least=at_least) if settings.size == "native" else None
        if small is not None:
            return small
        data = opened.sample.members[opened.suffix]
        return decode_rgb(data, at_least=at_least, max_pixels=settings.max_pixels, suffix=opened.suffix)


def _close(
    opened: Opened, answer: DeltaAnswer, epsilon: float, settings: ApplySettings, spent: float
) -> ProtectedPicture | Rejection:
    try:
        done = close_sample(opened, answer.delta, epsilon, settings=settings, delta_seconds=spent)
    except SampleError as error:
        return rejection_of(opened.sample, error)
    return ProtectedPicture(done, answer.cluster, answer.distance)


def _batches(items: Iterable[Sample | Rejection], batch_size: int) -> Iterator[list[Sample | Rejection]]:
    """Batches bounded by count and by the bytes of their files: a decoded picture is some 10 times as large."""
    batch: list[Sample | Rejection] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(map(len, item.members.values())) if isinstance(item, Sample) else 0
        if len(batch) == batch_size or size * 10 > PIXELS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
