"""What of EXIF, XMP and colour profiles may stay in a file, and that no second picture hides in it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import ExifTags

from pipeline.metadata import clean_exif, clean_xmp, orientation_of
from pipeline.picture import Picture, decode, encode
from tests.pictures import LIMIT, SRGB, chunk, reopened
from tests.samples import image_bytes, noise


def thumbnailed_exif() -> tuple[bytes, bytes]:
    """EXIF by hand, with a thumbnail, a maker's note, a place and a gap that all hold a JPEG; and that JPEG."""
    secret = image_bytes(noise(8, 8, seed=5), "JPEG", quality=30)

    def directory(at: int, entries: list[tuple[int, int, int, bytes]], following: int) -> tuple[bytes, int]:
        table, pool, pool_at = struct.pack("<H", len(entries)), b"", at + 2 + 12 * len(entries) + 4
        for tag, kind, count, value in sorted(entries):
            if len(value) > 4:
                value, pool = struct.pack("<I", pool_at + len(pool)), pool + value
            table += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        return table + struct.pack("<I", following) + pool, pool_at + len(pool)

    base = 1000
    sub, end = directory(
        base, [(0x829A, 5, 1, struct.pack("<II", 1, 60)), (0x927C, 7, len(secret), secret), (0x9000, 7, 4, b"0232")], 0
    )
    gps, end2 = directory(end, [(1, 2, 2, b"N\0"), (2, 5, 3, struct.pack("<6I", 48, 1, 51, 1, 30, 1))], 0)
    thumb, thumb_end = directory(
        end2,
        [
            (0x0103, 3, 1, b"\6\0"),
            (0x0201, 4, 1, struct.pack("<I", 4000)),
            (0x0202, 4, 1, struct.pack("<I", len(secret))),
        ],
        0,
    )
    first, first_end = directory(
        8,
        [
            (0x010F, 2, 6, b"Maker\0"),
            (0x0112, 3, 1, b"\6\0"),
            (0x8769, 4, 1, struct.pack("<I", base)),
            (0x8825, 4, 1, struct.pack("<I", end)),
        ],
        end2,
    )
    tiff = bytearray(4000)
    tiff[:8] = b"II*\0" + struct.pack("<I", 8)
    tiff[8:first_end] = first
    tiff[base:thumb_end] = sub + gps + thumb
    assert thumb_end < 3000
    return b"Exif\0\0" + bytes(tiff) + secret, secret


@pytest.mark.parametrize("how", ["same", "lossless"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_thumbnail_or_makers_note_is_left_and_all_else_is(kind: str, how: str) -> None:
    exif, secret = thumbnailed_exif()
    data = image_bytes(noise(12, 20), kind, exif=exif)
    assert secret in data
    written = encode(decode(data, max_pixels=LIMIT, suffix="x"), how=how, metadata="keep")[0]
    assert secret not in written
    assert secret[20:60] not in written
    found = reopened(written).getexif()
    assert found[ExifTags.Base.Make] == "Maker"
    assert found[ExifTags.Base.Orientation] == 1
    details = found.get_ifd(ExifTags.IFD.Exif)
    assert details[ExifTags.Base.ExposureTime] == 1 / 60
    assert ExifTags.Base.MakerNote not in details
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[2] == (48.0, 51.0, 30.0)
    assert found.get_ifd(ExifTags.IFD.IFD1) == {}


def test_gps_goes_by_strip_gps_and_everything_but_colours_by_strip() -> None:
    exif, _ = thumbnailed_exif()
    xmp = b'<rdf:Description exif:GPSLatitude="48,51.5N"/>'
    picture = decode(
        image_bytes(noise(8, 8), "JPEG", exif=exif, xmp=xmp, icc_profile=SRGB), max_pixels=LIMIT, suffix=""
    )
    without = encode(picture, how="same", metadata="strip-gps")[0]
    assert b"GPSLatitude" not in without
    assert reopened(without).getexif().get_ifd(ExifTags.IFD.GPSInfo) == {}
    assert reopened(without).getexif()[ExifTags.Base.Make] == "Maker"
    assert struct.pack("<II", 51, 1) not in without
    bare = reopened(encode(picture, how="same", metadata="strip")[0])
    assert not bare.getexif()
    assert "xmp" not in bare.info
    assert bare.info["icc_profile"] == SRGB


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_xmp_and_colour_profiles_are_kept_to_the_byte(kind: str) -> None:
    xmp = '<x:xmpmeta><rdf:Description dc:creator="é 🏖"/></x:xmpmeta>'.encode()
    picture = decode(image_bytes(noise(8, 8), "JPEG", xmp=xmp, icc_profile=SRGB), max_pixels=LIMIT, suffix="")
    again = reopened(
        encode(Picture(picture.pixels, kind, None, picture.icc, picture.xmp), how="same", metadata="keep")[0]
    )
    assert again.info["xmp"] == xmp
    assert again.info["icc_profile"] == SRGB


def test_a_profile_of_other_colours_than_the_pixels_have_is_dropped() -> None:
    assert decode(image_bytes(noise(8, 8, 1), "JPEG", icc_profile=SRGB), max_pixels=LIMIT, suffix="").icc is None


@pytest.mark.parametrize(
    "mark", [b"xmpGImg:image", b"xmp:Thumbnails", b"hdrgm:Version", b"GContainer:x Container:Directory"]
)
def test_xmp_with_pictures_in_it_is_dropped(mark: bytes) -> None:
    assert clean_xmp(b"<a " + mark + b"/>", keep_gps=True) is None
    assert clean_xmp(b"<a b='/9j/4AAQSkZJRg'/>", keep_gps=True) is None
    assert clean_xmp(b"<a b='c'/>", keep_gps=True) == b"<a b='c'/>"


def test_other_segments_and_text_chunks_are_dropped() -> None:
    jpeg = bytearray(image_bytes(noise(8, 8), "JPEG", comment=b"a comment"))
    jpeg[2:2] = b"\xff\xed" + struct.pack(">H", 22) + b"Photoshop 3.0\0thumb."
    written = encode(decode(bytes(jpeg), max_pixels=LIMIT, suffix=""), how="same", metadata="keep")[0]
    assert b"Photoshop" not in written
    assert b"comment" not in written
    png = image_bytes(noise(8, 8))
    png = png[:33] + chunk(b"tEXt", b"Comment\0hello there") + png[33:]
    written = encode(decode(png, max_pixels=LIMIT, suffix=""), how="same", metadata="keep")[0]
    assert b"hello" not in written


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 50]
)
def test_broken_exif_is_dropped_and_never_raises(exif: bytes) -> None:
    assert orientation_of(exif, None) == 1
    clean_exif(exif, keep_gps=True)


def test_any_damage_to_exif_is_survived() -> None:
    exif, secret = thumbnailed_exif()
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(exif)
        for place in rng.integers(6, 1200, 5):
            damaged[place] = rng.integers(256)
        cleaned = clean_exif(bytes(damaged), keep_gps=True)
        assert cleaned is None or len(cleaned) <= len(exif)


def test_exif_whose_values_overlap_does_not_grow() -> None:
    entries = b"".join(struct.pack("<HHII", tag, 7, 60_000, 0) for tag in range(1000, 4000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3000) + entries + bytes(60_000)
    assert clean_exif(exif, keep_gps=True) is None
