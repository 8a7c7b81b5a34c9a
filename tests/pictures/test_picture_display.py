"""What says how a picture's numbers are to be shown, transparency included, is kept exactly."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from pipeline.errors import SampleError
from pipeline.pictures.formats import kind_of
from pipeline.pictures.picture import decode, encode
from tests.support.pictures import LIMIT, chunk
from tests.support.samples import image_bytes, noise

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
    grey = np.rint(samples / ((1 << depth) - 1) * 255) if depth < 16 else samples >> 8
    assert (picture.pixels[:, :, :-1] == grey).all()
    again = decode(encode(picture, how="same", metadata="keep")[0], max_pixels=LIMIT, suffix="png")
    assert (again.pixels == picture.pixels).all()
    assert (picture.lower is None) == (depth < 16)
    if picture.lower is not None and again.lower is not None:
        assert (picture.lower[:, :, :-1] == samples & 255).all()
        assert (again.lower == picture.lower).all()


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
