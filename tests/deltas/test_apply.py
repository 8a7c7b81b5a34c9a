"""Every sample is protected or has a reason; nothing unprotected leaves, and nothing else changes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.deltas.apply import LaidDeltas, ShardOutcome, protect_sample, protect_shard
from pipeline.errors import PromiseError, Reason, SampleError
from pipeline.records import Sample
from pipeline.settings import Settings
from pipeline.shards.tar import ShardWriter
from tests.support.pictures import exif_with
from tests.support.samples import ExtremeDeltas, image_bytes, noise, read, tar_bytes

LOSSLESS = Settings(encode="lossless")


def reason_of(members: dict[str, bytes], settings: Settings = Settings()) -> Reason:  # noqa: B008
    with pytest.raises(SampleError) as error:
        protect_sample(Sample("k", members), LaidDeltas(ExtremeDeltas()), 0, settings=settings)
    return error.value.reason


def protect(
    tmp_path: Path,
    data: bytes,
    clusters: dict[str, int],
    settings: Settings = Settings(),  # noqa: B008
) -> tuple[ShardOutcome, list[Sample]]:
    path = tmp_path / "out.tar"
    with ShardWriter(path, compressed=False) as writer:
        outcome = protect_shard(read(data), writer, LaidDeltas(ExtremeDeltas()), clusters, settings=settings)
    return outcome, [item for item in read(path.read_bytes()) if isinstance(item, Sample)]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(2, 3), (5, 300), (24, 24), (113, 57)])
def test_the_decoded_lossless_output_stays_within_epsilon(channels: int, size: tuple[int, int]) -> None:
    before = noise(*size, channels)
    done = protect_sample(Sample("k", {"png": image_bytes(before)}), LaidDeltas(ExtremeDeltas()), 1, settings=LOSSLESS)
    after = np.asarray(Image.open(io.BytesIO(done.sample.members["png"]))).reshape(before.shape)
    difference = np.abs(after.astype(int) - before)
    assert difference.max() == done.max_abs_delta <= 16
    if channels in (2, 4):
        assert (difference[:, :, -1] == 0).all()
    if min(size) >= 24:
        assert difference[:, :, :3].mean() > 1  # something was added


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 4]), st.integers(0, 7))
@hypothesis_settings(deadline=None, max_examples=60)
def test_epsilon_holds_at_any_size(height: int, width: int, channels: int, cluster: int) -> None:
    before = noise(height, width, channels, seed=cluster).clip(1, 254)  # no pixel that cannot change
    sample = Sample("k", {"webp" if channels > 2 else "png": image_bytes(before)})
    refused = None
    try:
        done = protect_sample(sample, LaidDeltas(ExtremeDeltas()), cluster, settings=LOSSLESS)
    except SampleError as error:
        refused = error.reason
    if refused is not None:  # opposite signs that are averaged into a few pixels may leave nothing
        delta = ExtremeDeltas().delta_for(cluster, "k", height, width)
        seen = delta if channels > 2 else delta @ np.array([0.299, 0.587, 0.114])
        assert (refused, np.abs(seen).max() < 1) == (Reason.UNCHANGED, True)
        return
    after = np.asarray(Image.open(io.BytesIO(done.sample.members["png"]))).reshape(before.shape)
    assert np.abs(after.astype(int) - before).max() <= 16


# upright (row, column) -> stored (row, column) of H x W pixels, as the EXIF standard words it
STORED = {
    1: lambda r, c, h, w: (r, c),
    2: lambda r, c, h, w: (r, w - 1 - c),
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    4: lambda r, c, h, w: (h - 1 - r, c),
    5: lambda r, c, h, w: (c, r),
    6: lambda r, c, h, w: (h - 1 - c, r),
    7: lambda r, c, h, w: (h - 1 - c, w - 1 - r),
    8: lambda r, c, h, w: (c, w - 1 - r),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_delta_is_of_the_upright_view_and_laid_in_the_stored_layout(kind: str, orientation: int) -> None:
    height, width = 26, 41
    exif = exif_with(Orientation=orientation)
    data = image_bytes(noise(height, width), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    upright = (width, height) if orientation >= 5 else (height, width)
    laid = ExtremeDeltas().delta_for(3, "k", *upright)
    expected = before.copy()
    for row, column in np.ndindex(*upright):
        expected[STORED[orientation](row, column, height, width)] += laid[row, column]
    expected = expected.clip(0, 255).astype(np.uint8)
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    deltas = LaidDeltas(ExtremeDeltas())
    for sample in (Sample("k", {suffix: data}),) * 2:  # the second is remembered
        done = protect_sample(sample, deltas, 3, settings=Settings()).sample.members[suffix]
        after = Image.open(io.BytesIO(done))
        assert after.size == (width, height)
        assert after.getexif()[0x0112] == orientation
        options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
        wanted = Image.open(io.BytesIO(image_bytes(expected, kind, **options.get(kind, {}))))
        assert (np.asarray(after) == np.asarray(wanted)).all()


def test_each_cluster_has_its_own_delta() -> None:
    sample = Sample("k", {"png": image_bytes(noise(30, 30))})
    deltas = LaidDeltas(ExtremeDeltas())
    first, second = (protect_sample(sample, deltas, c, settings=LOSSLESS).sample.members for c in (0, 1))
    assert first != second


def test_sidecars_are_kept_to_the_byte_and_in_order() -> None:
    members = {"cls": b"3", "jpg": image_bytes(noise(9, 9), "JPEG"), "json": b'{"a":"\xff"}', "npy": bytes(99)}
    settings = Settings(keep_sidecar=["NPY"])
    done = protect_sample(Sample("k", members), LaidDeltas(ExtremeDeltas()), 0, settings=settings)
    assert list(done.sample.members) == ["cls", "jpg", "json", "npy"]
    assert {name: done.sample.members[name] for name in ("cls", "json", "npy")} == {
        name: members[name] for name in ("cls", "json", "npy")
    }
    assert done.sample.members["jpg"] != members["jpg"]
    assert (done.input_image_bytes, done.output_image_bytes) == (len(members["jpg"]), len(done.sample.members["jpg"]))


@pytest.mark.parametrize(
    ("suffix", "kind", "how", "renamed", "written"),
    [
        ("jpg", "JPEG", "same", "jpg", "JPEG"),
        ("JPG", "PNG", "same", "JPG", "PNG"),
        ("jpeg", "JPEG", "lossless", "png", "PNG"),
        ("left.jpg", "JPEG", "lossless", "left.png", "PNG"),
        ("PNG", "PNG", "lossless", "PNG", "PNG"),
        ("png", "PNG", "jpeg:90", "jpg", "JPEG"),
        ("jpeg", "JPEG", "jpeg:90", "jpeg", "JPEG"),
        ("webp", "WEBP", "same", "webp", "WEBP"),
        ("WebP", "PNG", "jpeg:1", "jpg", "JPEG"),
    ],
)
def test_the_image_is_renamed_only_where_its_new_bytes_ask_for_it(
    suffix: str, kind: str, how: str, renamed: str, written: str
) -> None:
    sample = Sample("k", {"cls": b"", suffix: image_bytes(noise(9, 9), kind), "txt": b""})
    done = protect_sample(sample, LaidDeltas(ExtremeDeltas()), 0, settings=Settings(encode=how)).sample.members
    assert list(done) == ["cls", renamed, "txt"]
    assert Image.open(io.BytesIO(done[renamed])).format == written


PNG = image_bytes(noise(6, 6))
TIFF = image_bytes(noise(6, 6), "TIFF")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"cls": b"1"}, Reason.NO_IMAGE),
        ({"jpg": PNG, "png": PNG}, Reason.SEVERAL_IMAGES),
        ({"jpg": PNG, "seg.png": PNG}, Reason.SEVERAL_IMAGES),
        ({"jpg": PNG, "thumb": PNG}, Reason.SEVERAL_IMAGES),
        ({"jpg": PNG, "raw": TIFF}, Reason.UNKNOWN_SIDECAR),
        ({"jpg": PNG, "txt": b"\0\0\0\x20ftypheic" + bytes(20)}, Reason.UNKNOWN_SIDECAR),
        ({"jpg": PNG, "mp4": b"whatever"}, Reason.UNKNOWN_SIDECAR),
        ({"jpg": PNG, "GIF": b""}, Reason.UNKNOWN_SIDECAR),
        ({"tif": TIFF}, Reason.UNSUPPORTED_FORMAT),
        ({"data": PNG}, Reason.UNSUPPORTED_FORMAT),
        ({"jpg": TIFF}, Reason.UNSUPPORTED_FORMAT),
        ({"jpg": b""}, Reason.EMPTY),
        ({"jpg": PNG[:-30]}, Reason.UNDECODABLE),
    ],
)
def test_no_picture_leaves_without_protection(members: dict[str, bytes], reason: Reason) -> None:
    assert reason_of(members) is reason


@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_a_picture_that_its_delta_cannot_change_is_a_rejection(size: tuple[int, int]) -> None:
    class Darker(ExtremeDeltas):
        def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
            return np.full((height, width, 3), -16, np.int16)

    black = Sample("k", {"png": image_bytes(np.zeros((*size, 3), np.uint8))})
    with pytest.raises(SampleError) as error:
        protect_sample(black, LaidDeltas(Darker()), 0, settings=LOSSLESS)
    assert error.value.reason == Reason.UNCHANGED
    white = Sample("k", {"png": image_bytes(np.full((*size, 3), 255, np.uint8))})
    assert protect_sample(white, LaidDeltas(Darker()), 0, settings=LOSSLESS).max_abs_delta == 16


@pytest.mark.parametrize("quality", [1, 5, 50])
def test_a_picture_is_a_rejection_where_coarse_coding_leaves_nothing_of_its_delta(quality: int) -> None:
    """Grey that a JPEG of the quality holds exactly, under a delta of a level and of 16."""
    settings = Settings(encode=f"jpeg:{quality}")
    pixels = np.asarray(
        Image.open(io.BytesIO(image_bytes(np.full((16, 16, 3), 128, np.uint8), "JPEG", quality=quality)))
    )
    sample = Sample("k", {"jpg": image_bytes(pixels, "JPEG", quality=quality)})

    class Faint(ExtremeDeltas):
        def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
            return np.sign(super().delta_for(cluster, key, height, width))

    with pytest.raises(SampleError) as error:
        protect_sample(sample, LaidDeltas(Faint()), 0, settings=settings)
    assert error.value.reason is Reason.UNCHANGED
    if quality == 50:
        done = protect_sample(sample, LaidDeltas(ExtremeDeltas()), 0, settings=settings)
        assert (np.asarray(Image.open(io.BytesIO(done.sample.members["jpg"]))) != pixels).any()


def test_transparency_that_a_jpeg_would_lose_is_a_rejection() -> None:
    assert reason_of({"png": image_bytes(noise(6, 6, 4))}, Settings(encode="jpeg:95")) is Reason.UNSUPPORTED_FORMAT


def test_size_224_protects_the_papers_crop() -> None:
    settings = Settings(encode="lossless", size="224")
    sample = Sample("k", {"png": image_bytes(noise(300, 280))})
    done = protect_sample(sample, LaidDeltas(ExtremeDeltas()), 0, settings=settings)
    assert Image.open(io.BytesIO(done.sample.members["png"])).size == (224, 224)


def test_a_source_that_breaks_its_bound_stops_the_shard(tmp_path: Path) -> None:
    class Wrong(ExtremeDeltas):
        def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
            return np.full((height, width, 3), 17, np.int16)

    sample = Sample("k", {"png": PNG})
    with ShardWriter(tmp_path / "o.tar", compressed=False) as writer, pytest.raises(PromiseError, match="bound is 16"):
        protect_shard([sample], writer, LaidDeltas(Wrong()), {"k": 0}, settings=Settings())


def test_a_shard_accounts_for_every_sample(tmp_path: Path) -> None:
    jpeg = image_bytes(noise(20, 30), "JPEG")
    data = tar_bytes(
        [
            ("a.jpg", jpeg),
            ("a.cls", b"1"),
            ("b.jpg", jpeg[:100]),
            ("c.txt", b"no image"),
            ("/d.jpg", jpeg),
            ("e.jpg", jpeg),
            ("f.png", PNG),
            ("g.jpg", b""),
        ]
    )
    outcome, samples = protect(tmp_path, data, {"a": 2, "b": 1, "c": 1, "f": 2})
    assert [sample.key for sample in samples] == ["a", "f"]
    assert [(one.key, one.member, one.reason.value) for one in outcome.rejections] == [
        ("b", "b.jpg", "undecodable"),
        ("c", "c.txt", "no-image"),
        ("/d", "/d.jpg", "unsafe-name"),
        ("e", "e.jpg", "undecodable"),
        ("g", "g.jpg", "empty"),
    ]
    assert outcome.rejections[3].detail == "the sample was not embedded, so it has no cluster"
    assert outcome.num_protected == 2
    assert outcome.num_quarantined == 5
    assert outcome.quarantine == {"empty": 1, "no-image": 1, "undecodable": 2, "unsafe-name": 1}
    assert outcome.clusters == {2: 2}
    assert outcome.max_abs_delta == 16
    assert outcome.input_image_bytes == len(jpeg) + len(PNG)
    assert outcome.output_image_bytes == sum(len(s.members["jpg" if s.key == "a" else "png"]) for s in samples)
    assert {"read", "decode", "delta", "add", "encode", "write"} <= set(outcome.seconds)


def test_the_same_shard_gives_the_same_bytes_whatever_is_remembered(tmp_path: Path) -> None:
    members = [(f"{index}.jpg", image_bytes(noise(20 + index % 3, 30, seed=index), "JPEG")) for index in range(12)]
    samples = read(tar_bytes(members))
    digests = set()
    for max_bytes in (0, 5_000, 1 << 20):
        with ShardWriter(tmp_path / "o.tar", compressed=True) as writer:
            deltas = LaidDeltas(ExtremeDeltas(), max_bytes)
            protect_shard(samples, writer, deltas, {str(i): i % 4 for i in range(12)}, settings=Settings())
        digests.add(writer.sha256)
        assert hashlib.sha256((tmp_path / "o.tar").read_bytes()).hexdigest() == writer.sha256
    assert len(digests) == 1


def test_memory_does_not_grow_with_the_length_of_a_shard(tmp_path: Path) -> None:
    jpeg = image_bytes(noise(64, 64), "JPEG")

    def peak(count: int) -> int:
        samples = (Sample(str(index), {"jpg": jpeg, "cls": b"1"}) for index in range(count))
        tracemalloc.start()
        with ShardWriter(tmp_path / "o.tar", compressed=False) as writer:
            deltas = LaidDeltas(ExtremeDeltas())
            protect_shard(samples, writer, deltas, {str(i): 0 for i in range(1000)}, settings=Settings())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(1000) < 1.2 * peak(100)


def test_laid_deltas_are_remembered_within_their_limit_and_never_for_keyed_sources() -> None:
    class Counting(ExtremeDeltas):
        calls = 0

        def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
            self.calls += 1
            return super().delta_for(cluster, key, height, width)

    source = Counting()
    deltas = LaidDeltas(source, max_bytes=2 * 30 * 30 * 3 * 2)
    for cluster in (0, 1, 0, 1, 2, 1, 0):
        levels = deltas.delta_for(cluster, "k", 30, 30).levels
        assert (levels == ExtremeDeltas().delta_for(cluster, "k", 30, 30)).all()
    assert source.calls == 4  # 0, 1, 2, and 0 again, which had to make room
    keyed = Counting()
    keyed.per_sample = True
    deltas = LaidDeltas(keyed)
    for _ in range(3):
        deltas.delta_for(0, "k", 30, 30)
    assert keyed.calls == 3


EXPECTED_REJECTIONS = {
    "phone/ultrahdr.jpg": "undecodable",
    "phone/frame_size.mpo": "unsupported-format",
    "phone/IMG_0001.heic": "unsupported-format",
    "phone/IMG_0002.jpg": "unsupported-format",
    "phone/IMG_0003_10bit.heif": "unsupported-format",
    "phone/hopper.avif": "unsupported-format",
    "anim/blend_over.apng.png": "animated",
    "anim/different_durations.png": "animated",
    "anim/dispose_prev.gif": "unsupported-format",
    "anim/chi.gif": "unsupported-format",
    "anim/iss634.webp": "animated",
    "wrong/webp_without_extension": "unusable-name",
    "broken/truncated_jpeg.jpg": "undecodable",
    "broken/truncated_image.png": "undecodable",
    "broken/broken_data_stream.png": "undecodable",
    "broken/truncated.heic": "unsupported-format",
    "broken/flower_first_60_percent.jpg": "undecodable",
    "broken/empty.jpg": "empty",
    "broken/text.jpg": "unsupported-format",
    "broken/page.png": "unsupported-format",
    "bomb/decompression_bomb.gif": "unsupported-format",
    "bomb/30000x30000_1bit.png": "too-many-pixels",
    # a single black pixel, which this delta would make darker
    "bomb/text_chunk_bomb.png": "unchanged",
    "jpeg/multiple_exif.jpg": "unchanged",
    "jpeg/xmp_padded.jpg": "unchanged",
}
PASSED_OVER = {".DS_Store"}  # what a Mac keeps beside files is no sample


@pytest.mark.parametrize("how", ["same", "lossless"])
def test_every_real_upload_ends_protected_or_with_its_reason(tmp_path: Path, native_uploads: Path, how: str) -> None:
    files = {f["path"]: f["expect"] for f in json.loads((native_uploads / "manifest.json").read_text())["files"]}
    with tarfile.open(native_uploads / "native-uploads.tar") as tar:
        originals = {path: tar.extractfile(path).read() for path in files}  # type: ignore[union-attr]
    names = {}  # member name in the shard -> path: every file is a sample of its own, in a folder of its own
    for index, path in enumerate(files):
        names[f"{index:02d}/{path}"] = path
    data = tar_bytes([(name, originals[path]) for name, path in names.items()], format=tarfile.GNU_FORMAT)
    clusters = {item.key: 3 for item in read(data, 1 << 24)}
    outcome, samples = protect(tmp_path, data, clusters, Settings(encode=how))
    refused = {names[one.member]: one.reason.value for one in outcome.rejections}
    expected = EXPECTED_REJECTIONS | {
        path: "unsupported-format" for path in files if path.startswith(("tiff/", "other/"))
    }
    assert refused == expected
    assert len(samples) == outcome.num_protected == len(set(files) - PASSED_OVER - set(expected))
    by_key = {name.rsplit("/", 1)[0] + "/" + name.rsplit("/", 1)[1].split(".")[0]: path for name, path in names.items()}
    for sample in samples:
        path = by_key[sample.key]
        (encoded,) = sample.members.values()
        after = Image.open(io.BytesIO(encoded))
        before = Image.open(io.BytesIO(originals[path]))
        assert after.size == before.size, path
        assert list(ImageOps.exif_transpose(after).size) == files[path]["upright_size"], path
        assert after.getexif().get(0x0112, 1) == before.getexif().get(0x0112, 1), path
        if how == "lossless" and before.mode in ("RGB", "L", "RGBA"):
            difference = np.abs(np.asarray(after).astype(int) - np.asarray(before))
            assert difference.max() <= 16, path


def test_rejections_of_the_reader_pass_through(tmp_path: Path) -> None:
    data = tar_bytes([("a.png", PNG), ("b.png", PNG)])
    cut = data.index(b"b.png") + 512 + 10  # in the body of b.png
    outcome, samples = protect(tmp_path, data[:cut], {"a": 0, "b": 0})
    assert [sample.key for sample in samples] == ["a"]
    assert [(one.key, one.member, one.reason) for one in outcome.rejections] == [("b", "b.png", Reason.TRUNCATED_SHARD)]
