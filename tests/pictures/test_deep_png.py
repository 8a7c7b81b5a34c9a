"""PNGs of 16 bits a sample keep them: files made by hand, and read back by two libraries that did not write them."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.errors import SampleError
from pipeline.pictures.deep_png import deep_png, deep_samples
from pipeline.pictures.picture import decode, encode, resize_and_crop
from pipeline.records import Sample
from pipeline.settings import Settings
from tests.support.pictures import LIMIT, chunk

KINDS = {1: 0, 2: 4, 3: 2, 4: 6}  # colour type by channels


def samples_of_noise(channels: int, size: tuple[int, int] = (37, 53)) -> NDArray[np.uint16]:
    return np.random.default_rng(channels).integers(0, 1 << 16, (*size, channels)).astype(np.uint16)


def by_hand(samples: NDArray[np.uint16], *before: bytes) -> bytes:
    """A PNG without filters."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, KINDS[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples))
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def seen_by_opencv(data: bytes, channels: int) -> NDArray[np.uint16]:
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    return read.reshape(*read.shape[:2], -1)[..., order]


@pytest.mark.parametrize("channels", KINDS)
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (2, 900)])
@pytest.mark.parametrize("how", ["same", "lossless"])
def test_every_bit_comes_back(channels: int, size: tuple[int, int], how: str) -> None:
    samples = samples_of_noise(channels, size)
    picture = decode(by_hand(samples), max_pixels=LIMIT, suffix="png")
    assert np.array_equal(picture.pixels, samples >> 8)
    data, _ = encode(picture, how=how, metadata="keep")
    assert data[24:26] == bytes((16, KINDS[channels]))
    assert np.array_equal(seen_by_opencv(data, channels), samples)
    again = decode(data, max_pixels=LIMIT, suffix="png")
    assert np.array_equal(again.pixels, picture.pixels)
    assert encode(again, how=how, metadata="keep")[0] == data


@pytest.mark.parametrize("channels", KINDS)
def test_a_delta_moves_the_upper_bytes_within_the_bound_of_either_scale(channels: int) -> None:
    levels = np.random.default_rng(0).integers(-16, 17, (37, 53, 1)).astype(np.int16).repeat(3, axis=2)
    samples = samples_of_noise(channels)
    done = protect_sample(
        Sample("k", {"png": by_hand(samples)}), LaidDeltas(Fixed(levels)), 0, settings=Settings(), reread=1.0
    )
    after = seen_by_opencv(done.sample.members["png"], channels).astype(int)
    colour = slice(0, channels - 1 if channels in (2, 4) else channels)
    change = (after - samples)[..., colour]
    moved = np.clip((samples[..., colour] >> 8) + levels[..., :1], 0, 255) - (samples[..., colour] >> 8)
    assert np.array_equal(change, 256 * moved)
    assert np.abs(change).max() <= 16 / 255 * 65535
    assert channels % 2 or np.array_equal(after[..., -1], samples[..., -1])
    assert done.survival == pytest.approx(1)
    shown = np.asarray(Image.open(io.BytesIO(done.sample.members["png"])).convert("RGBA"), int)
    if channels > 1:  # Pillow shows the upper bytes
        assert np.array_equal(shown[..., 0], after[..., 0] >> 8)


class Fixed:
    """A source of one delta, int16 [H, W, 3], for pictures of its size."""

    epsilon, per_sample = 16 / 255, False

    def __init__(self, levels: NDArray[np.int16]) -> None:
        self._levels = levels

    def delta_for(self, cluster: int, key: str, height: int, width: int) -> NDArray[np.int16]:
        return self._levels


def test_metadata_stays_where_its_text_names_a_chunk() -> None:
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF/>IDAT</x:xmpmeta>"
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    density = struct.pack(">IIB", 11811, 11811, 1)
    data = by_hand(samples_of_noise(3), text, chunk(b"pHYs", density), chunk(b"gAMA", struct.pack(">I", 45455)))
    picture = decode(data, max_pixels=LIMIT, suffix="png")
    written = encode(picture, how="same", metadata="keep")[0]
    again = decode(written, max_pixels=LIMIT, suffix="png")
    assert (again.xmp, again.display) == (picture.xmp, picture.display)
    assert Image.open(io.BytesIO(written)).info["dpi"] == pytest.approx((300, 300), abs=0.1)
    exif = Image.Exif()
    exif[274] = 6
    turned = deep_png(samples_of_noise(1), exif=exif.tobytes())
    assert Image.open(io.BytesIO(turned)).getexif()[274] == 6


def test_what_is_not_written_as_a_png_or_at_its_size_has_eight_bits() -> None:
    picture = decode(by_hand(samples_of_noise(3, (300, 300))), max_pixels=LIMIT, suffix="png")
    assert encode(picture, how="jpeg:95", metadata="keep")[0][:2] == b"\xff\xd8"
    assert encode(resize_and_crop(picture), how="same", metadata="keep")[0][24] == 8


def test_eight_bits_are_left_to_others_and_a_torn_file_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    nothing = np.zeros((4, 4, 3), np.uint8)
    assert deep_samples(buffer.getvalue(), nothing) is None
    assert deep_samples(b"\xff\xd8", nothing) is None
    whole = by_hand(samples_of_noise(3))
    with pytest.raises(SampleError):
        decode(whole[: len(whole) // 2], max_pixels=LIMIT, suffix="png")
    broken = bytearray(whole)
    broken[25] = 5  # no such colour type
    with pytest.raises(ValueError, match="cannot be read"):
        deep_samples(bytes(broken), nothing)
    with pytest.raises(ValueError, match="two decoders disagree"):
        deep_samples(whole, nothing)
