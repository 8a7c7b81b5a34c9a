"""What of EXIF, XMP and colour profiles may stay in a file, and that no second picture hides in it."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, ImageCms

from pipeline.pictures.metadata import clean_exif, clean_icc, clean_xmp, orientation_of
from pipeline.pictures.picture import Picture, decode, encode
from tests.support.pictures import LIMIT, SRGB, chunk, reopened
from tests.support.samples import image_bytes, noise


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
    assert found[ExifTags.Base.Orientation] == 6
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
    assert dict(bare.getexif()) == {ExifTags.Base.Orientation: 6}
    assert bare.getexif().get_ifd(ExifTags.IFD.Exif) == {}
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


# ---- copies that hide in what may stay

COPY = image_bytes(noise(40, 40, seed=3), "JPEG", quality=50)
WEBP = image_bytes(noise(40, 40, seed=3), "WEBP", quality=50)


def exif_of(*entries: tuple[int, int, bytes]) -> bytes:
    """EXIF by hand with entries (tag, type, value) in its first directory."""
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 7: 1}
    table, pool, at = struct.pack("<H", len(entries)), b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, value in sorted(entries):
        number = len(value) // sizes[kind]
        if len(value) > 4:
            value, pool = struct.pack("<I", at + len(pool)), pool + value + bytes(len(value) % 2)
        table += struct.pack("<HHI", tag, kind, number) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + bytes(4) + pool


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x010E, 2, base64.b64encode(COPY)),
        (0x010E, 2, base64.b64encode(WEBP)),
        (0x010E, 2, WEBP),
        (0x010E, 2, COPY.hex().encode()),
        (0x9286, 7, b"ASCII\0\0\0" + base64.b64encode(COPY)),
        (0x9286, 7, b"UNICODE\0" + base64.b64encode(COPY).decode().encode("utf-16-le")),
        (0x9286, 7, b"UNICODE\0" + base64.b64encode(COPY)),
        (0x9C9C, 1, base64.b64encode(WEBP).decode().encode("utf-16-le")),
        (0x9C9C, 1, WEBP),
        (0x0100, 4, noise(30, 30).tobytes()),
        (0x012D, 3, noise(30, 30).tobytes()),
        (0x1234, 7, b"unknown"),
        (0xC4A5, 7, b"PrintIM\x000300\0\0"),
    ],
)
def test_exif_values_that_hide_a_copy_or_are_not_understood_are_dropped(tag: int, kind: int, value: bytes) -> None:
    kept = (0x8298, 2, "© A. Person, all rights reserved; ask before use: https://example.com/licence".encode() + b"\0")
    cleaned = clean_exif(exif_of((tag, kind, value), kept), keep_gps=True)
    assert cleaned == exif_of(kept)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (0x010E, 2, b"A long description, with all kinds of words in it, of a dog on a beach; and of a cat. " * 20),
        (0x9286, 7, b"UNICODE\0" + ("Фотография собаки на берегу моря " * 5).encode("utf-16-le")),
        (0x9C9B, 1, ("海辺の犬の写真。" * 20).encode("utf-16-le") + b"\0\0"),
        (0x012D, 3, bytes(range(256)) * 6),
        (0xA431, 2, b"0123456789\0"),
    ],
)
def test_what_people_write_into_exif_stays(tag: int, kind: int, value: bytes) -> None:
    exif = exif_of((tag, kind, value), (0x0112, 3, b"\3\0"))
    assert clean_exif(exif, keep_gps=True) == exif


@pytest.mark.parametrize("data", [COPY, WEBP, image_bytes(noise(40, 40))])
def test_xmp_with_an_encoded_copy_is_dropped(data: bytes) -> None:
    text = base64.b64encode(data)
    for hidden in (text, text.replace(b"/", b"&#x2F;").replace(b"R", b"&#82;"), data.hex().encode()):
        assert clean_xmp(b"<rdf:Description my:note='" + hidden + b"'/>", keep_gps=True) is None


def profile_with(tags: dict[bytes, bytes], behind: bytes = b"") -> bytes:
    table, pool, at = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", at + len(pool), len(value))
        pool += value + bytes(-len(value) % 4)
    body = SRGB[4:128] + struct.pack(">I", len(tags)) + table + pool
    return struct.pack(">I", 4 + len(body)) + body + behind


def tags_of(icc: bytes) -> dict[bytes, bytes]:
    entries = [struct.unpack_from(">4sII", icc, 132 + 12 * row) for row in range(int.from_bytes(icc[128:132], "big"))]
    return {tag: icc[at : at + size] for tag, at, size in entries}


def test_a_profile_loses_what_lies_behind_it_between_its_tags_and_in_private_ones() -> None:
    usual = tags_of(SRGB)
    whole = profile_with(usual)
    assert clean_icc(whole, space=b"RGB ") == whole
    assert clean_icc(whole + COPY, space=b"RGB ") == whole
    grown = (len(whole) + len(COPY)).to_bytes(4, "big") + whole[4:] + COPY
    for changed in (grown, profile_with(usual | {b"priv": COPY}), profile_with(usual | {b"lumi": COPY})):
        cleaned = clean_icc(changed, space=b"RGB ")
        assert cleaned is not None
        assert COPY[20:60] not in cleaned
        assert tags_of(cleaned) == usual
        assert int.from_bytes(cleaned[:4], "big") == len(cleaned)
        ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(cleaned)))  # still one that is understood
    described = clean_icc(profile_with(usual | {b"desc": b"text\0\0\0\0" + base64.b64encode(COPY)}), space=b"RGB ")
    assert described is not None
    assert set(tags_of(described)) == set(usual) - {b"desc"}


def test_a_broken_profile_is_dropped_and_never_raises() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(SRGB)
        for place in rng.integers(0, 300, 4):
            damaged[place] = rng.integers(256)
        clean_icc(bytes(damaged[: rng.integers(0, len(SRGB) + 1)]), space=b"RGB ")
    assert clean_icc(b"", space=b"RGB ") is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_copy_that_hides_in_metadata_is_in_what_is_written(kind: str) -> None:
    exif = exif_of((0x010E, 2, base64.b64encode(COPY)), (0x013B, 2, WEBP))
    xmp = b"<rdf:Description my:note='" + base64.b64encode(WEBP) + b"'/>"
    data = image_bytes(noise(8, 8), kind, exif=exif, xmp=xmp, icc_profile=SRGB + COPY)
    written = encode(decode(data, max_pixels=LIMIT, suffix="x"), how="same", metadata="keep")[0]
    if kind == "PNG":
        written = b"".join(decompressed for decompressed in (written, reopened(written).info["icc_profile"]))
    for secret in (COPY, WEBP):
        assert secret[30:60] not in written
        assert base64.b64encode(secret)[30:60] not in written
    assert SRGB in written
