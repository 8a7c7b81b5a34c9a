"""Deltas for pictures that no earlier stage has seen: embed, find the nearest cluster and protect in one pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.apply import LaidDeltas, ProtectedSample, close_sample, cluster_of
from pipeline.deltas.delta import LaidDelta, lay
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.kinds import maker_of
from pipeline.errors import SampleError
from pipeline.pictures.formats import pixels_in
from pipeline.pictures.members import Opened, open_sample, rejection_of
from pipeline.pictures.picture import decode_rgb, rgb_of, squeezed, stored
from pipeline.records import Rejection, Sample
from pipeline.settings import ApplySettings
from pipeline.surrogates.surrogate import Surrogate

PIXELS_AT_ONCE = 64_000_000  # limit per batch, whose decoded pictures are all in memory

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DeltaRequest:
    """One picture that needs a delta.

    small        uint8 [h, w, 3], the picture to embed, perhaps decoded at a smaller scale; None if `cluster` is given
    height       of the upright picture, pixels
    width        of the upright picture, pixels
    square       uint8 [S, S, 3], the whole picture squeezed to PictureDeltas.side; None if that is None
    cluster      of a picture that was embedded and assigned before; None otherwise
    orientation  EXIF orientation of the stored pixels, 1 to 8
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

    delta     in the orientation of the stored pixels, within epsilon
    cluster   the cluster with the nearest centroid
    distance  to that centroid; much larger than in the fitted images means drift
    """

    delta: LaidDelta
    cluster: int
    distance: float


class PictureDeltas(Protocol):
    """Anything that can give the deltas of new pictures."""

    @property
    def epsilon(self) -> float:
        """Bound on |delta|, pixel units."""

    @property
    def at_least(self) -> int:
        """Shorter side in pixels that the pictures to be embedded must have, where the originals have it."""

    @property
    def side(self) -> int | None:
        """Side in pixels of the squares that deltas are made from; None if they do not depend on the picture."""

    @property
    def uses_small(self) -> bool:
        """True if deltas are made from the picture that is embedded, so that it must be the part that is written."""

    def for_pictures(self, requests: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        """One answer each."""


class NearestDeltas:
    """The delta of the nearest cluster (Zhang et al. 2023), without clustering again.

    surrogate  embeds the pictures that have no cluster yet; None if all have one
    Raises ConflictError if the surrogate is not the one that the protection was fitted with.
    """

    def __init__(self, protection: Protection, surrogate: Surrogate | None) -> None:
        if surrogate is not None:
            protection.check_surrogate(surrogate.id)
        self.epsilon, self.at_least = protection.epsilon, surrogate.resize if surrogate is not None else 1
        self.side, self.uses_small = None, False
        self._protection, self._surrogate, self._laid = protection, surrogate, LaidDeltas(protection)

    def for_pictures(self, requests: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        clusters, distances = nearest_clusters(requests, self._protection, self._surrogate)
        return [
            DeltaAnswer(
                self._laid.delta_for(cluster, request.key, request.height, request.width, request.orientation),
                cluster,
                distance,
            )
            for request, cluster, distance in zip(requests, clusters, distances, strict=True)
        ]


class SampleDeltas:
    """A delta for each picture, made from its own pixels towards the target of its cluster.

    surrogate  embeds the pictures that have no cluster yet; None if all have one
    Raises ConflictError if the surrogate is not the one that the protection was fitted with.
    """

    def __init__(self, protection: Protection, surrogate: Surrogate | None, device: str = "cpu") -> None:
        assert protection.sample is not None
        if surrogate is not None:
            protection.check_surrogate(surrogate.id)
        self.epsilon, self.at_least = protection.epsilon, surrogate.resize if surrogate is not None else 1
        self.side, self.uses_small = protection.sample.side, False
        self._protection, self._surrogate = protection, surrogate
        self._maker = maker_of(protection.sample, protection.targets, protection.epsilon, device)

    def for_pictures(self, requests: Sequence[DeltaRequest]) -> list[DeltaAnswer]:
        clusters, distances = nearest_clusters(requests, self._protection, self._surrogate)
        squares = np.stack([request.square for request in requests if request.square is not None])
        levels = self._maker.levels(squares, clusters, [request.key for request in requests])
        return [
            DeltaAnswer(request.laid(lay(delta, request.height, request.width, self.epsilon)), cluster, distance)
            for request, delta, cluster, distance in zip(requests, levels, clusters, distances, strict=True)
        ]


def nearest_clusters(
    requests: Sequence[DeltaRequest], protection: Protection, surrogate: Surrogate | None
) -> tuple[list[int], list[float]]:
    """Cluster and distance of each picture: as given, with distance nan, or else of the nearest centroid."""
    clusters = [-1 if request.cluster is None else request.cluster for request in requests]
    distances = [float("nan")] * len(requests)
    unassigned = [row for row, request in enumerate(requests) if request.cluster is None]
    if unassigned:
        assert surrogate is not None
        features = surrogate.embed_pictures([small for row in unassigned if (small := requests[row].small) is not None])
        # float16 as stored by the stage `embed`, so that a picture has the same cluster either way
        assigned = protection.clustering.assign(features.astype(np.float16))
        for row, cluster, distance in zip(unassigned, *assigned, strict=True):
            clusters[row], distances[row] = int(cluster), float(distance)
    return clusters, distances


@dataclass(frozen=True)
class ProtectedPicture:
    """A protected sample, with the cluster of its delta and the distance to it."""

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
    """Protect or reject every sample, in input order; read, embedded and encoded batch by batch.

    batch_size  pictures to embed at once; fewer if together they exceed PIXELS_AT_ONCE pixels
    threads     threads that decode and encode a batch
    clusters    key -> cluster; a sample without one is rejected. None: pictures are embedded here
    The first results are available before the second batch is read. Raises PromiseError if a bound does not hold.
    """
    with ThreadPoolExecutor(threads) as pool:
        opener = PictureOpener(settings, deltas, clusters)
        for batch in picture_batches(samples, batch_size):
            opened = list(pool.map(opener.open, batch))
            usable = [result for result in opened if not isinstance(result, Rejection)]
            started = time.perf_counter()
            answers = deltas.for_pictures([request for _, request in usable]) if usable else []
            spent = (time.perf_counter() - started) / max(1, len(usable))
            closing = iter(
                [
                    pool.submit(_close, picture, answer, deltas.epsilon, settings, spent)
                    for (picture, _), answer in zip(usable, answers, strict=True)
                ]
            )
            for result in opened:
                yield result if isinstance(result, Rejection) else next(closing).result()


class PictureOpener:
    """Decodes samples, and says what is needed to give each its delta.

    clusters  as for protect_pictures
    """

    def __init__(self, settings: ApplySettings, deltas: PictureDeltas, clusters: Mapping[str, int] | None) -> None:
        self._settings, self._deltas, self._clusters = settings, deltas, clusters

    def open(self, item: Sample | Rejection) -> tuple[Opened, DeltaRequest] | Rejection:
        """The decoded sample and its request, or why it cannot be protected."""
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
        """The picture as the stage `embed` sees it; decoded again only if that uses another scale."""
        settings, at_least = self._settings, self._deltas.at_least
        if self._deltas.uses_small and settings.size != "native":
            return opened.picture.rgb
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


def picture_batches(items: Iterable[Sample | Rejection], batch_size: int) -> Iterator[list[Sample | Rejection]]:
    """Batches of at most `batch_size` items and PIXELS_AT_ONCE pixels; a larger picture is a batch of its own.

    Where a header does not say how many pixels a picture has, they are ten times the bytes.
    """
    batch: list[Sample | Rejection] = []
    size = 0
    for item in items:
        members = item.members.values() if isinstance(item, Sample) else ()
        more = sum(max(10 * len(member), pixels_in(member)) for member in members)
        if batch and size + more > PIXELS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
        if len(batch) == batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
