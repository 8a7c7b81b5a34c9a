"""What is refused, with which reason and how soon; and what a decoder says to nobody."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import Reason, SampleError
from pipeline.pictures.formats import kind_of
from pipeline.pictures.picture import decode, decode_rgb, encode
from tests.support.pictures import LIMIT, SRGB, chunk, reopened
from tests.support.samples import image_bytes, noise


def pixels_of(data: bytes) -> np.ndarray:
    return decode(data, max_pixels=LIMIT, suffix="jpg").pixels


def refusal(data: bytes, max_pixels: int = LIMIT) -> Reason:
    with pytest.raises(SampleError) as error:
        decode(data, max_pixels=max_pixels, suffix="jpg")
    with pytest.raises(SampleError) as same:
        decode_rgb(data, at_least=8, max_pixels=max_pixels, suffix="jpg")
    assert same.value.reason is error.value.reason
    return error.value.reason


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
        "import io, numpy as np; from PIL import Image; from pipeline.pictures.picture import decode\n"
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
