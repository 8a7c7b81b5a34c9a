"""One pass over new pictures gives the bytes of the two passes of a run: embed and assign, then protect."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.clusters.clustering import fit_clusters
from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.picture_deltas import (
    PIXELS_AT_ONCE,
    NearestDeltas,
    PictureOpener,
    ProtectedPicture,
    picture_batches,
    protect_pictures,
)
from pipeline.deltas.protection import Protection
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.errors import ConflictError, Reason
from pipeline.pictures.formats import pixels_in
from pipeline.records import Rejection, Sample
from pipeline.settings import Settings
from pipeline.shards.photographs import photograph
from pipeline.surrogates.embed import embed_shard
from pipeline.surrogates.surrogate import load_surrogate
from tests.support.pictures import exif_with
from tests.support.samples import image_bytes
from tests.support.universal import untrained

SETTINGS = Settings(encode="lossless", max_pixels=1_000_000)
NAMES = ("grass", "brick", "coffee", "astronaut")


@pytest.fixture(scope="module")
def surrogate():
    return load_surrogate("timm:test_resnet.random-0", weights=None, size=32, device="cpu")


def samples(count: int = 24) -> list[Sample]:
    """Patches of photographs, grey and colour, JPEG and PNG, of several sizes, with a label beside each."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        pixels = photograph(NAMES[number % 4])
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        side = (40, 64, 90)[number % 3]
        top, left = (int(rng.integers(0, size - side)) for size in pixels.shape[:2])
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
        patch = np.ascontiguousarray(pixels[top : top + side, left : left + side - number % 5])
        lying = {"exif": exif_with(Orientation=number % 8 + 1)}
        members = {suffix: image_bytes(patch, kind, **lying), "cls": str(number % 4).encode()}
        found.append(Sample(f"{number:03d}", members))
    return found


@pytest.fixture(scope="module")
def protection(surrogate) -> Protection:
    features, _, _ = embed_shard(samples(), surrogate, shard="s", batch_size=8, threads=1, max_pixels=1_000_000)
    fitted = fit_clusters([features.values], "features", None, 3, restarts=2, seed=0)
    levels = np.random.default_rng(1).integers(-16, 17, (3, 3, 16, 16)).astype(np.int8)
    return Protection("uc", "direct", surrogate.id, 16 / 255, fitted.clustering, (1, 2, 0), levels, "f" * 64)


def test_one_pass_gives_the_bytes_of_two(surrogate, protection):
    features, _, _ = embed_shard(samples(), surrogate, shard="s", batch_size=8, threads=1, max_pixels=1_000_000)
    clusters, distances = protection.clustering.assign(features.values)
    assert len(set(clusters.tolist())) == 3
    deltas = NearestDeltas(protection, surrogate)
    found = list(protect_pictures(samples(), deltas, settings=SETTINGS, batch_size=7, threads=2))
    for one, sample, cluster, distance in zip(found, samples(), clusters, distances, strict=True):
        assert isinstance(one, ProtectedPicture)
        expected = protect_sample(sample, LaidDeltas(protection), int(cluster), settings=SETTINGS)
        assert one.cluster == cluster
        assert one.distance == pytest.approx(float(distance), abs=1e-3)
        assert one.done.sample.key == sample.key
        assert dict(one.done.sample.members) == dict(expected.sample.members)
        assert 0 < one.done.max_abs_delta <= 16


def test_rejections_keep_their_place_and_reason(surrogate, protection):
    good = samples(4)
    given = [
        good[0],
        Rejection("r", "r.jpg", Reason.UNSAFE_NAME, "as the reader found it"),
        Sample("broken", {"jpg": good[0].members["jpg"][:200]}),
        Sample("huge", {"png": image_bytes(np.zeros((1100, 1000, 3), np.uint8), "PNG")}),
        Sample("none", {"txt": b"no picture"}),
        good[1],
    ]
    deltas = NearestDeltas(protection, surrogate)
    found = list(protect_pictures(given, deltas, settings=SETTINGS, batch_size=3))
    reasons = [one.reason if isinstance(one, Rejection) else None for one in found]
    assert reasons == [None, Reason.UNSAFE_NAME, Reason.UNDECODABLE, Reason.TOO_MANY_PIXELS, Reason.NO_IMAGE, None]


def test_the_first_results_come_before_the_rest_is_read(surrogate, protection):
    read = 0

    def source() -> Iterator[Sample]:
        nonlocal read
        for sample in samples():
            read += 1
            yield sample

    results = protect_pictures(source(), NearestDeltas(protection, surrogate), settings=SETTINGS, batch_size=4)
    next(results)
    assert read == 4


def flat(side: int, kind: str, **options: object) -> Sample:
    picture = Image.new("L", (side, side), 128)
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return Sample(f"{side}-{kind}", {kind.lower(): stream.getvalue(), "txt": b"a caption"})


KINDS = (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("GIF", {}))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_batches_are_limited_by_the_pixels_of_small_files_too(kind: str, options: dict[str, object]) -> None:
    picture = flat(3_900, kind, **options)  # 15 megapixels in 13 to 250 kB
    assert pixels_in(picture.members[kind.lower()]) == 3_900**2
    assert [len(batch) for batch in picture_batches([picture] * 10, 32)] == [4, 4, 2]
    small = flat(8, kind, **options)
    assert [len(batch) for batch in picture_batches([small] * 33, 32)] == [32, 1]
    huge = Sample("huge", {"bmp": bytes(PIXELS_AT_ONCE)})  # of which nothing is known but its bytes
    assert [len(batch) for batch in picture_batches([small, huge, small], 32)] == [1, 1, 1]
    assert pixels_in(b"a caption") == 0


def test_a_header_that_is_cut_off_or_damaged_has_some_size_and_is_no_failure():
    for kind, options in KINDS:
        data = flat(16, kind, **options).members[kind.lower()]
        assert pixels_in(data) == 256
        assert all(pixels_in(data[:end]) >= 0 for end in range(len(data)))
    tables = flat(16, "JPEG").members["jpeg"]
    at = tables.index(b"\xff\xdb") + 4
    assert pixels_in(tables[:at] + b"\x10" + tables[at + 1 :]) == 256  # said to have two bytes a step, which it has not


def test_a_batch_of_nothing_usable_is_no_failure(surrogate, protection):
    given = [Sample("none", {"txt": b"no picture"})]
    (found,) = protect_pictures(given, NearestDeltas(protection, surrogate), settings=SETTINGS, batch_size=4)
    assert isinstance(found, Rejection)


def test_another_surrogate_is_refused(protection):
    other = load_surrogate("timm:test_resnet.random-1", weights=None, size=32, device="cpu")
    with pytest.raises(ConflictError, match="fitted for surrogate"):
        NearestDeltas(protection, other)


@pytest.mark.parametrize("size", ["224", "native"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_universal_generator_sees_the_part_of_a_picture_that_is_written(size: Any, kind: str) -> None:
    surrogate = load_surrogate("timm:test_resnet.random-0", weights=None, size=32, device="cpu")
    settings = Settings(method="one-for-all", protection="p", epsilon=8 / 255, size=size)
    opener = PictureOpener(settings, UniversalDeltas(untrained(surrogate), surrogate), None)
    pixels = np.tile(np.linspace(0, 255, 900).astype(np.uint8)[None, :, None], (300, 1, 3))
    suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
    opened = opener.open(Sample("wide", {suffix: image_bytes(pixels, kind)}))
    assert not isinstance(opened, Rejection)
    picture, request = opened
    assert request.small is not None
    written = picture.picture.rgb
    assert written.shape == ((224, 224, 3) if size == "224" else (300, 900, 3))
    height, width = request.small.shape[:2]
    assert width / height == written.shape[1] / written.shape[0]
    for column in (0.1, 0.9):  # both show the same grey at the same place
        seen = int(request.small[height // 2, int(column * width), 0])
        assert abs(seen - int(written[written.shape[0] // 2, int(column * written.shape[1]), 0])) <= 3
