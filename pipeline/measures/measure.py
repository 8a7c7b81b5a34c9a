"""Re-read what was written: a hash-sample of protected files is decoded and compared with the originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.deltas.load import AnyProtection
from pipeline.errors import InputError, SampleError
from pipeline.hashing import derive, in_sample
from pipeline.measures.gallery import PER_CLUSTER, GallerySample
from pipeline.measures.removal import RemovalCheck, check_removal
from pipeline.measures.scores import PictureScore, score_picture
from pipeline.pictures.members import image_suffix
from pipeline.pictures.picture import decode, decode_rgb, resize_and_crop
from pipeline.records import Rejection, Sample
from pipeline.settings import Settings
from pipeline.surrogates.features import Assignment

SCORED_IMAGES = 200  # for the histograms
AVERAGED_PER_CLUSTER = 300  # for the removal check: 10 give a correlation of .45, 100 of .61, 300 of .65
READ_SHARDS = 32
_SHOWN_SIDE = 160  # pixels a side, of a picture in the report
_REMOVAL_SIDE = 72


@dataclass(frozen=True)
class ShardMeasures:
    """What one shard contributes to a run's figures.

    squares   uint8 [m, 3, S, S], protected pictures as an averaging trainer would see them
    clusters  int64 [m], of the squares
    deltas    float32 [m, 3, S, S] in 8-bit levels, the delta in each square
    """

    scores: tuple[PictureScore, ...]
    shown: tuple[GallerySample, ...]
    squares: NDArray[np.uint8]
    clusters: NDArray[np.int64]
    deltas: NDArray[np.float32]


def measured_shards(names: list[str], seed: int) -> list[str]:
    """The shards to re-read, chosen by hash, sorted by name."""
    return sorted(sorted(names, key=lambda name: derive(seed, "measured-shard", name))[:READ_SHARDS])


def measure_shard(
    output: Iterable[Sample | Rejection],
    source: Iterable[Sample | Rejection],
    assignment: Assignment,
    protection: AnyProtection,
    settings: Settings,
    *,
    num_images: int,
) -> ShardMeasures:
    """Measure a hash-sample of one shard.

    output      samples of the protected shard
    source      samples of the original shard
    num_images  images in all measured shards; determines the share that is sampled
    """
    clusters = dict(zip(assignment.keys, assignment.clusters.tolist(), strict=True))
    score_share = SCORED_IMAGES / num_images
    average_share = AVERAGED_PER_CLUSTER * len(protection.clustering.centroids) / num_images
    scores: list[PictureScore] = []
    shown: list[GallerySample] = []
    squares: list[tuple[NDArray[np.uint8], int, NDArray[np.float32]]] = []
    for before, after in _pairs(source, output):
        cluster = clusters[after.key]
        is_scored = in_sample(score_share, settings.seed, "score", assignment.shard, after.key)
        wanted = sum(sample.cluster == cluster for sample in shown) < PER_CLUSTER
        if is_scored or wanted:
            original, protected = _pixels(before, settings, resize=True), _pixels(after, settings)
            if is_scored:
                scores.append(score_picture(after.key, cluster, original, protected))
            if wanted:
                shown.append(GallerySample(after.key, cluster, _thumbnail(original), _thumbnail(protected)))
        if in_sample(average_share, settings.seed, "average", assignment.shard, after.key):
            squares.append(_square(before, after, cluster, protection, settings))
    side = _REMOVAL_SIDE
    return ShardMeasures(
        tuple(scores),
        tuple(shown),
        np.stack([s for s, _, _ in squares]) if squares else np.zeros((0, 3, side, side), np.uint8),
        np.array([c for _, c, _ in squares], np.int64),
        np.stack([d for _, _, d in squares]) if squares else np.zeros((0, 3, side, side), np.float32),
    )


def removal_of(parts: list[ShardMeasures], protection: AnyProtection, settings: Settings) -> RemovalCheck | None:
    """How well deltas can be estimated from the protected pixels of all parts; None if there are too few images."""
    squares = np.concatenate([part.squares for part in parts])
    clusters = np.concatenate([part.clusters for part in parts])
    deltas = np.concatenate([part.deltas for part in parts])
    present = np.unique(clusters)
    if len(present) < 2 or len(squares) < 4 * len(present):
        return None
    clusters = np.searchsorted(present, clusters)
    if protection.per_sample:
        return check_removal(squares, clusters, epsilon=protection.epsilon, seed=settings.seed, own_deltas=deltas)
    first = [int(np.flatnonzero(clusters == index)[0]) for index in range(len(present))]
    return check_removal(
        squares, clusters, epsilon=protection.epsilon, seed=settings.seed, cluster_deltas=deltas[first]
    )


def _pairs(
    source: Iterable[Sample | Rejection], output: Iterable[Sample | Rejection]
) -> Iterator[tuple[Sample, Sample]]:
    """Original and protected samples of a shard, paired; quarantined originals are skipped."""
    originals = iter(source)
    for after in output:
        if not isinstance(after, Sample):
            raise InputError(f"the output cannot be read back ({after.detail}); run jobs/verify.py")
        for before in originals:
            if isinstance(before, Sample) and before.key == after.key:
                yield before, after
                break


def _pixels(sample: Sample, settings: Settings, *, resize: bool = False) -> NDArray[np.uint8]:
    """Upright pixels without alpha, [H, W] or [H, W, 3]; set `resize` for originals, in case of --size 224."""
    try:
        suffix = image_suffix(sample, settings.keep_sidecar)
        picture = decode(sample.members[suffix], max_pixels=settings.max_pixels, suffix=suffix)
    except SampleError as error:
        raise InputError(f"{sample.key}: {error}; run jobs/verify.py") from None
    if resize and settings.size == "224":
        picture = resize_and_crop(picture)
    upright = np.ascontiguousarray(picture.upright)
    return upright[..., 0] if upright.shape[2] <= 2 else upright[..., :3]


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most 160 pixels a side, cropped from the centre rather than scaled, so that the delta is shown unchanged."""
    height, width = pixels.shape[:2]
    top, left = max(0, (height - _SHOWN_SIDE) // 2), max(0, (width - _SHOWN_SIDE) // 2)
    cut = pixels[top : top + _SHOWN_SIDE, left : left + _SHOWN_SIDE]
    return np.ascontiguousarray(cut if cut.ndim == 3 else np.repeat(cut[..., None], 3, axis=2))


def _square(
    before: Sample, after: Sample, cluster: int, protection: AnyProtection, settings: Settings
) -> tuple[NDArray[np.uint8], int, NDArray[np.float32]]:
    """A protected picture at a fixed size, as a trainer would load it, and the delta it carries at that size."""
    if protection.needs_pixels:  # the delta exists only in the picture: decode both alike, not at a scale of the JPEG
        square, original = (_squeezed(_pixels(one, settings, resize=one is before)) for one in (after, before))
        laid = square.astype(np.float32) - original
    else:
        suffix = image_suffix(after, settings.keep_sidecar)
        data, limit = after.members[suffix], settings.max_pixels
        square = _squeezed(decode_rgb(data, at_least=_REMOVAL_SIDE, max_pixels=limit, suffix=suffix))
        laid = protection.delta_for(cluster, after.key, _REMOVAL_SIDE, _REMOVAL_SIDE).astype(np.float32)
    return square.transpose(2, 0, 1), cluster, laid.transpose(2, 0, 1)


def _squeezed(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    size = (_REMOVAL_SIDE, _REMOVAL_SIDE)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR))
