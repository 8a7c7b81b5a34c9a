"""Every image becomes upright 8-bit pixels or a reason; no copy of the picture hides in what is written."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from torchvision import transforms

from pipeline.errors import SampleError
from pipeline.formats import kind_of
from pipeline.picture import Picture, decode, decode_rgb, encode, resize_and_crop, stored
from pipeline.records import Reason
from tests.pictures import LIMIT, SRGB, chunk, exif_with, reopened
from tests.samples import image_bytes, noise


def pixels_of(data: bytes, suffix: str = "jpg") -> np.ndarray:
    return decode(data, max_pixels=LIMIT, suffix=suffix).pixels


def refusal(data: bytes, max_pixels: int = LIMIT) -> Reason:
    with pytest.raises(SampleError) as error:
        decode(data, max_pixels=max_pixels, suffix="jpg")
    with pytest.raises(SampleError) as same:
        decode_rgb(data, at_least=8, max_pixels=max_pixels, suffix="jpg")
    assert same.value.reason is error.value.reason
    return error.value.reason


# ---- modes


@pytest.mark.parametrize(
    ("channels", "kind"), [(1, "PNG"), (2, "PNG"), (3, "PNG"), (4, "PNG"), (3, "WEBP"), (4, "WEBP")]
)
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 48)])
def test_lossless_pictures_come_back_to_the_pixel(channels: int, kind: str, size: tuple[int, int]) -> None:
    before = noise(*size, channels)
    if channels == 4:
        before[0, 0] = (9, 8, 7, 0)  # the colour under full transparency is kept as well
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = decode(image_bytes(before, kind, **options), max_pixels=LIMIT, suffix="x")
    assert picture.format == kind
    assert (picture.pixels == before).all()
    data, suffix = encode(picture, how="same", metadata="keep")
    assert suffix is None
    assert (pixels_of(data) == before).all()
    assert kind_of(data) == kind


def test_16_bit_grey_is_divided_by_257_and_rounded() -> None:
    wide = np.array([[0, 128, 129, 257, 385, 386, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    assert pixels_of(buffer.getvalue())[0, :, 0].tolist() == [round(value / 257) for value in wide[0].tolist()]


def test_one_bit_becomes_grey_and_cmyk_becomes_rgb_without_its_profile() -> None:
    bits = Image.fromarray(noise(8, 8, 1)[:, :, 0] > 127)
    buffer = io.BytesIO()
    bits.save(buffer, "PNG")
    assert (pixels_of(buffer.getvalue())[:, :, 0] == np.asarray(bits) * 255).all()

    profile = bytearray(SRGB)
    profile[16:20] = b"CMYK"
    cmyk = Image.fromarray(noise(16, 16, 4)).convert("RGB").convert("CMYK")
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG", icc_profile=bytes(profile))
    picture = decode(buffer.getvalue(), max_pixels=LIMIT, suffix="jpg")
    assert (picture.pixels == np.asarray(reopened(buffer.getvalue()).convert("RGB"))).all()
    assert picture.icc is None


@pytest.mark.parametrize("transparent", [None, 3])
def test_palettes_become_the_colours_that_pillow_shows(transparent: int | None) -> None:
    image = Image.fromarray(noise(20, 20)).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({} if transparent is None else {"transparency": transparent}))
    expected = reopened(buffer.getvalue()).convert("RGB" if transparent is None else "RGBA")
    found = pixels_of(buffer.getvalue())
    assert (found == np.asarray(expected)).all()
    assert transparent is None or (found[:, :, 3] == 0).any()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG"), ("jpeg", "JPEG")])
def test_a_still_gif_becomes_what_its_name_says(suffix: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(9, 9)).quantize(8).save(buffer, "GIF")
    picture = decode(buffer.getvalue(), max_pixels=LIMIT, suffix=suffix)
    assert picture.format == kind
    assert kind_of(encode(picture, how="same", metadata="keep")[0]) == kind


# ---- refusals


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"\0" * 50, Reason.UNSUPPORTED_FORMAT),
        (b"<html>no image</html>", Reason.UNSUPPORTED_FORMAT),
        (b"\xff\xd8\xff", Reason.UNDECODABLE),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), Reason.UNDECODABLE),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(30), Reason.UNDECODABLE),
        (b"GIF89a", Reason.UNDECODABLE),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    assert refusal(data) is reason


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "ICO", "JPEG2000", "AVIF"])
def test_formats_that_are_not_written_are_recognised_and_refused(kind: str) -> None:
    data = image_bytes(noise(32, 32), kind)
    assert kind_of(data) is not None
    assert refusal(data) is Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("text", [b"BMW is a car", b'{"a": 1}', b"7", b"a photo of a dog", b"", bytes(64)])
def test_ordinary_sidecars_are_not_taken_for_pictures(text: bytes) -> None:
    assert kind_of(text) is None


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_every_truncation_is_refused(kind: str, options: dict[str, Any]) -> None:
    data = image_bytes(noise(40, 40), kind, **options)
    for share in (0.05, 0.3, 0.6, 0.9):
        assert refusal(data[: int(len(data) * share)]) is Reason.UNDECODABLE


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(noise(12, 12, seed=seed)) for seed in (1, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    assert refusal(buffer.getvalue()) is Reason.ANIMATED


def test_of_a_multi_picture_jpeg_the_first_is_taken_and_the_second_dropped() -> None:
    frames = [Image.fromarray(noise(16, 24, seed=seed)) for seed in (1, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:])
    picture = decode(buffer.getvalue(), max_pixels=LIMIT, suffix="jpg")
    assert (picture.pixels == np.asarray(reopened(buffer.getvalue()))).all()
    written = encode(picture, how="same", metadata="keep")[0]
    assert written.count(b"\xff\xd8\xff") == 1


def png_bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((side // 8 + 1) * min(side, 3000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def webp_bomb(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    return b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + size + bytes(8)


def gif_bomb(side: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def jpeg_bomb(side: int) -> bytes:
    data = bytearray(image_bytes(noise(8, 8), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_bomb(60_000), webp_bomb(16_000), gif_bomb(60_000), jpeg_bomb(60_000)])
def test_bombs_are_refused_before_anything_is_decoded(bomb: bytes) -> None:
    refusal(bomb)  # imports what Pillow imports lazily
    tracemalloc.start()
    start = time.process_time()
    reason = refusal(bomb, max_pixels=100_000_000)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason is Reason.TOO_MANY_PIXELS
    assert seconds < 0.5
    assert peak < 3_000_000


def test_the_limit_is_the_users_and_not_pillows() -> None:
    data = image_bytes(noise(10, 11), "PNG")
    assert decode(data, max_pixels=110, suffix="png").pixels.shape == (10, 11, 3)
    assert refusal(data, max_pixels=109) is Reason.TOO_MANY_PIXELS


def test_want_of_memory_is_not_the_samples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", exhausted)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    with pytest.raises(MemoryError):
        decode(image_bytes(noise(4, 4)), max_pixels=LIMIT, suffix="png")


# ---- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_stay_as_they_are_stored_and_are_upright_as_pillow_turns_them(kind: str, orientation: int) -> None:
    data = image_bytes(noise(12, 20), kind, exif=exif_with(Orientation=orientation, Artist="A. Person"))
    seen = np.asarray(ImageOps.exif_transpose(reopened(data)).convert("RGB"))
    picture = decode(data, max_pixels=LIMIT, suffix="x")
    assert (picture.pixels == np.asarray(reopened(data).convert("RGB"))).all()
    assert picture.orientation == orientation
    assert (picture.upright == seen).all()
    assert (stored(picture.upright, orientation) == picture.pixels).all()
    assert picture.upright_size == seen.shape[:2]
    assert (decode_rgb(data, at_least=20, max_pixels=LIMIT, suffix="x") == seen).all()
    for metadata in ("keep", "strip-gps", "strip"):
        for how in ("same", "lossless"):
            again = reopened(encode(picture, how=how, metadata=metadata)[0])  # type: ignore[arg-type]
            assert again.size == (20, 12)
            assert again.getexif().get(ExifTags.Base.Orientation, 1) == orientation
            assert again.getexif().get(ExifTags.Base.Artist) == (None if metadata == "strip" else "A. Person")
            if how == "lossless":
                assert (np.asarray(ImageOps.exif_transpose(again)) == seen).all()


def test_orientation_in_xmp_counts_where_exif_has_none_and_stays_there() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:title="t"/></x:xmpmeta>'
    data = image_bytes(noise(12, 20), "JPEG", xmp=xmp)
    expected = np.asarray(ImageOps.exif_transpose(reopened(data)))
    assert expected.shape == (20, 12, 3)
    picture = decode(data, max_pixels=LIMIT, suffix="jpg")
    assert (picture.upright == expected).all()
    for how in ("same", "lossless"):
        assert reopened(encode(picture, how=how, metadata="keep")[0]).info["xmp"] == xmp
        bare = reopened(encode(picture, how=how, metadata="strip")[0])
        assert b'Orientation="6"' in bare.info["xmp"]
        assert b"title" not in bare.info["xmp"]
        assert np.asarray(ImageOps.exif_transpose(bare)).shape == (20, 12, 3)


# ---- transparency of one colour


def raw_png(samples: np.ndarray, depth: int, transparent: list[int]) -> bytes:
    """A PNG of samples [H, W, 1 | 3], `depth` bits each, with a tRNS chunk: made by hand."""
    height, width, channels = samples.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = (samples.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if channels == 3 else 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(f">{channels}H", *transparent)), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("depth", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_the_one_transparent_colour_of_a_png_is_kept_exactly(depth: int, channels: int) -> None:
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 1 << depth, (9, 13, channels))
    samples[::2, ::3] = samples[0, 0]
    samples[1, 1] = samples[0, 0] ^ (np.arange(channels) == channels - 1)  # differs in the lowest bit alone
    wide = samples[0, 0] + (0 if depth == 16 else 1 << depth)  # bits beyond the depth are not to be looked at
    picture = decode(
        raw_png(samples, depth, (samples[0, 0] if depth == 1 else wide).tolist()), max_pixels=LIMIT, suffix=""
    )
    expected = np.where((samples == samples[0, 0]).all(axis=2), 0, 255)
    assert (picture.pixels[:, :, -1] == expected).all()
    grey = np.rint(samples / ((1 << depth) - 1) * 255) if channels == 1 or depth < 16 else samples >> 8
    assert (picture.pixels[:, :, :-1] == grey).all()
    again = decode(encode(picture, how="same", metadata="keep")[0], max_pixels=LIMIT, suffix="png")
    assert (again.pixels == picture.pixels).all()


# ---- how the numbers are to be shown

SHOWN = {
    b"gAMA": struct.pack(">I", 100_000),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000),
    b"cICP": b"\x09\x10\0\1",
    b"mDCV": bytes(range(24)),
    b"cLLI": bytes(range(8)),
    b"pHYs": struct.pack(">IIB", 11811, 11810, 1),
    b"oFFs": struct.pack(">iiB", -3, 4, 0),
    b"sTER": b"\1",
}


def with_chunks(png: bytes, chunks: dict[bytes, bytes]) -> bytes:
    return png[:33] + b"".join(chunk(name, body) for name, body in chunks.items()) + png[33:]


def chunks_of(png: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        found[png[at + 4 : at + 8]] = png[at + 8 : at + 8 + size]
        at += 12 + size
    return found


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("metadata", ["keep", "strip"])
def test_a_png_keeps_every_chunk_that_says_how_it_is_shown_and_no_other(channels: int, metadata: str) -> None:
    others = {b"sRGB": b"\0\0", b"sBIT": b"\5\5\5", b"vpAg": b"x" * 50, b"tIME": bytes(7)}  # a wrong size; untrue; ...
    data = with_chunks(image_bytes(noise(6, 6, channels)), SHOWN | others)
    written = encode(decode(data, max_pixels=LIMIT, suffix=""), how="same", metadata=metadata)[0]  # type: ignore[arg-type]
    assert {name: body for name, body in chunks_of(written).items() if name not in (b"IHDR", b"IDAT", b"IEND")} == SHOWN
    assert list(chunks_of(written))[0] == b"IHDR"
    assert (decode(written, max_pixels=LIMIT, suffix="").pixels == noise(6, 6, channels)).all()


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_density_of_a_jpeg_is_kept_and_goes_with_it_into_a_png(unit: int, channels: int) -> None:
    data = bytearray(image_bytes(noise(8, 8, channels), "JPEG"))
    assert data[6:11] == b"JFIF\0"
    data[13:18] = struct.pack(">BHH", unit, 300, 150)
    picture = decode(bytes(data), max_pixels=LIMIT, suffix="jpg")
    assert encode(picture, how="same", metadata="keep")[0][13:18] == data[13:18]
    found = struct.unpack(">IIB", chunks_of(encode(picture, how="lossless", metadata="keep")[0])[b"pHYs"])
    assert found == {0: (300, 150, 0), 1: (11811, 5906, 1), 2: (30000, 15000, 1)}[unit]
    png = decode(
        with_chunks(image_bytes(noise(8, 8)), {b"pHYs": struct.pack(">IIB", 11811, 5906, 1)}),
        max_pixels=LIMIT,
        suffix="",
    )
    assert encode(png, how="jpeg:90", metadata="keep")[0][13:18] == struct.pack(">BHH", 1, 300, 150)


@pytest.mark.parametrize("name", [b"gAMA", b"cHRM", b"cICP"])
def test_a_png_with_another_gamma_does_not_become_a_jpeg_that_looks_otherwise(name: bytes) -> None:
    picture = decode(with_chunks(image_bytes(noise(6, 6)), {name: SHOWN[name]}), max_pixels=LIMIT, suffix="")
    with pytest.raises(SampleError, match="gamma and primaries"):
        encode(picture, how="jpeg:90", metadata="keep")
    usual = {
        b"gAMA": struct.pack(">I", 45455),
        b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    }
    picture = decode(with_chunks(image_bytes(noise(6, 6)), usual), max_pixels=LIMIT, suffix="")
    assert kind_of(encode(picture, how="jpeg:90", metadata="keep")[0]) == "JPEG"


# ---- what costs far more than it weighs


def many_scans(count: int, *, sequential: bool = False) -> bytes:
    data = image_bytes(noise(32, 32), "JPEG", progressive=not sequential, subsampling=0)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    if sequential:  # one component alone, again and again
        scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + scan[14:]
    return data[:last] + scan * count + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (many_scans(4000), "more than 100 scans"),
        (many_scans(4000, sequential=True), "more than 100 scans"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 500_000 + image_bytes(noise(8, 8), "JPEG")[2:], "segments"),
        (b"\xff\xd8" + b"\xff" * 2_000_000 + image_bytes(noise(8, 8), "JPEG")[2:], "between its segments"),
        (b"\xff\xd8" + b"\xff\0" * 1_000_000 + image_bytes(noise(8, 8), "JPEG")[2:], "between its segments"),
        (image_bytes(noise(8, 8))[:33] + chunk(b"teSt", b"") * 200_000 + image_bytes(noise(8, 8))[33:], "chunks"),
        (image_bytes(noise(8, 8), "GIF")[:-1] + b"!\xfe" + b"\1x" * 500_000 + b"\0;", "still GIF"),
    ],
)
def test_small_files_that_take_long_are_refused_at_once(data: bytes, words: str) -> None:
    start = time.process_time()
    with pytest.raises(SampleError, match=words) as error:
        decode(data, max_pixels=LIMIT, suffix="jpg")
    assert time.process_time() - start < 1
    assert error.value.reason is Reason.TOO_COSTLY


def test_ordinary_scans_and_what_only_looks_like_scans_are_not_refused() -> None:
    plain = image_bytes(noise(32, 32), "JPEG", progressive=True)
    assert pixels_of(many_scans(20)).shape == (32, 32, 3)
    video = np.random.default_rng(0).integers(0, 256, 30_000_000).astype(np.uint8).tobytes()  # behind the picture
    assert video.count(b"\xff\xda") > 100
    assert (pixels_of(plain + video) == pixels_of(plain)).all()


def test_texts_are_not_unpacked_and_large_profiles_neither_refused_nor_lost() -> None:
    profile = bytearray(SRGB[:128]) + struct.pack(">I4sII", 1, b"A2B0", 144, 3_000_000) + noise(1000, 1000).tobytes()
    profile[:4] = len(profile).to_bytes(4, "big")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    packed = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(profile), 1))
    png = image_bytes(noise(8, 8))
    start = time.process_time()
    picture = decode(png[:33] + bomb + packed + png[33:], max_pixels=LIMIT, suffix="png")
    assert (picture.pixels == noise(8, 8)).all()
    assert picture.icc == bytes(profile)
    written = encode(picture, how="same", metadata="keep")[0]
    assert decode(written, max_pixels=LIMIT, suffix="png").icc == picture.icc
    assert b"Comment" not in written
    huge = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(profile) * 4, 1))
    assert decode(png[:33] + huge + png[33:], max_pixels=LIMIT, suffix="png").icc is None
    assert time.process_time() - start < 2


def test_warnings_of_pillow_reach_nobody() -> None:
    program = (
        "import io, numpy as np; from PIL import Image; from pipeline.picture import decode\n"
        "b = io.BytesIO(); Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(b, 'PNG'); d = b.getvalue()\n"
        "actl = bytes.fromhex('000000086163544c0000000000000000'); import zlib\n"
        "d = d[:33] + actl + zlib.crc32(actl[4:]).to_bytes(4, 'big') + d[33:]\n"
        "decode(d, max_pixels=100, suffix='png')\n"
        "if PLAIN: import warnings; warnings.resetwarnings(); Image.open(io.BytesIO(d))"
    )
    for plain in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", f"PLAIN = {plain}\n{program}"], capture_output=True, text=True, check=True
        )
        assert ("Invalid APNG" in done.stderr) == plain
        assert plain or not done.stderr


# ---- encoding


def test_jpegs_are_written_at_quality_95_without_chroma_subsampling() -> None:
    before = noise(32, 32)
    data, suffix = encode(Picture(before, "JPEG"), how="same", metadata="keep")
    assert suffix is None
    assert data == image_bytes(before, "JPEG", quality=95, subsampling=0)
    data, suffix = encode(Picture(before, "PNG"), how="jpeg:70", metadata="keep")
    assert suffix == "jpg"
    assert data == image_bytes(before, "JPEG", quality=70, subsampling=0)


def test_what_a_jpeg_cannot_hold_is_refused_not_lost() -> None:
    for how, kind in (("jpeg:95", "PNG"), ("same", "JPEG")):
        with pytest.raises(SampleError, match="cannot keep the picture's transparency"):
            encode(Picture(noise(4, 4, 4), kind), how=how, metadata="keep")
    with pytest.raises(SampleError, match="longer than the 65500 pixels"):
        encode(Picture(noise(1, 70_000), "PNG"), how="jpeg:95", metadata="keep")


def test_two_processes_write_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np; from pipeline.picture import Picture, encode\n"
        "p = np.random.default_rng(3).integers(0, 256, (40, 30, 3)).astype(np.uint8)\n"
        "for k in ('JPEG', 'PNG', 'WEBP'):\n"
        "    print(hashlib.sha256(encode(Picture(p, k), how='same', metadata='keep')[0]).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    here = [encode(Picture(pixels, kind), how="same", metadata="keep")[0] for kind in ("JPEG", "PNG", "WEBP")]
    assert other == [hashlib.sha256(data).hexdigest() for data in here]


# ---- for the surrogate, and --size 224


@pytest.mark.parametrize(
    ("at_least", "size"), [(400, (300, 400)), (150, (150, 200)), (100, (150, 200)), (30, (38, 50))]
)
def test_jpegs_come_at_the_smallest_dct_scale_that_is_large_enough(at_least: int, size: tuple[int, int]) -> None:
    data = image_bytes(noise(300, 400), "JPEG", exif=exif_with(Orientation=6))
    found = decode_rgb(data, at_least=at_least, max_pixels=LIMIT, suffix="jpg")
    assert found.shape == (*size[::-1], 3)


def test_surrogates_see_grey_three_times_and_no_alpha() -> None:
    grey, clear = noise(6, 6, 2), noise(6, 6, 4)
    found = decode_rgb(image_bytes(grey), at_least=1, max_pixels=LIMIT, suffix="png")
    assert (found == grey[:, :, :1]).all()
    assert found.shape == (6, 6, 3)
    assert (decode_rgb(image_bytes(clear), at_least=1, max_pixels=LIMIT, suffix="png") == clear[:, :, :3]).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(300, 500), (257, 256), (224, 224), (31, 20), (256, 999)])
def test_size_224_is_what_the_papers_transforms_make(size: tuple[int, int], channels: int) -> None:
    pixels = noise(*size, channels)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    expected = np.asarray(transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image))
    found = resize_and_crop(Picture(pixels, "PNG")).pixels
    assert found.shape == (224, 224, channels)
    assert (found == expected.reshape(found.shape)).all()
    for orientation in range(2, 9):
        lying = Picture(stored(pixels, orientation), "PNG", orientation=orientation)
        assert (resize_and_crop(lying).upright == found).all()


def test_a_thin_picture_is_cropped_as_any_other_without_being_enlarged_whole() -> None:
    assert resize_and_crop(Picture(noise(60_000, 1), "PNG")).pixels.shape == (224, 224, 3)
    pixels = noise(1300, 20)  # 256 x 16640: just beyond what is resized whole
    expected = np.asarray(
        transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(pixels))
    )
    difference = np.abs(resize_and_crop(Picture(pixels, "PNG")).pixels.astype(int) - expected)
    assert difference.max() <= 1


# ---- real uploads


def test_every_real_upload_decodes_as_its_manifest_says(shared_data: Path) -> None:
    import tarfile

    folder = shared_data / "native"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    with tarfile.open(folder / "native-uploads.tar") as tar:
        for entry in files:
            data = tar.extractfile(entry["path"]).read()  # type: ignore[union-attr]
            expect = entry["expect"]
            still = expect.get("frames", 1) == 1 or expect.get("format") == "MPO"
            if entry["path"] == "bomb/text_chunk_bomb.png":  # of no harm: texts are not unpacked
                assert decode(data, max_pixels=LIMIT, suffix="png").format == "PNG"
            elif expect["decodes"] and expect["format"] in ("JPEG", "PNG", "WEBP", "GIF", "MPO") and still:
                picture = decode(data, max_pixels=100_000_000, suffix="jpg")
                height, width, channels = picture.upright.shape
                assert [width, height] == expect["upright_size"], entry["path"]
                assert (channels in (2, 4)) == expect.get("has_alpha", False) or channels == 3, entry["path"]
                assert (channels == 1) == (expect["mode"] in ("L", "I;16", "1")), entry["path"]
                upright = ImageOps.exif_transpose(reopened(data))
                if upright.mode in ("RGB", "RGBA", "L"):
                    assert (np.asarray(upright).reshape(picture.upright.shape) == picture.upright).all(), entry["path"]
                written = encode(picture, how="lossless", metadata="keep")[0]
                assert (decode(written, max_pixels=LIMIT, suffix="png").pixels == picture.pixels).all()
            else:
                with pytest.raises(SampleError):
                    decode(data, max_pixels=100_000_000, suffix="jpg")


def test_a_real_position_is_gone_after_strip_gps(shared_data: Path) -> None:
    import tarfile

    with tarfile.open(shared_data / "native" / "native-uploads.tar") as tar:
        data = tar.extractfile("phone/DSCN0012.jpg").read()  # type: ignore[union-attr]
    assert reopened(data).getexif().get_ifd(ExifTags.IFD.GPSInfo)
    picture = decode(data, max_pixels=LIMIT, suffix="jpg")
    kept = reopened(encode(picture, how="same", metadata="keep")[0]).getexif()
    before = reopened(data).getexif()
    assert kept.get_ifd(ExifTags.IFD.GPSInfo) == before.get_ifd(ExifTags.IFD.GPSInfo)
    wanted = dict(before.get_ifd(ExifTags.IFD.Exif))
    wanted.pop(ExifTags.Base.MakerNote, None)
    assert {tag: kept.get_ifd(ExifTags.IFD.Exif)[tag] for tag in wanted if tag != 0xA005} == {
        tag: value for tag, value in wanted.items() if tag != 0xA005
    }
    gone = encode(picture, how="same", metadata="strip-gps")[0]
    assert reopened(gone).getexif().get_ifd(ExifTags.IFD.GPSInfo) == {}
