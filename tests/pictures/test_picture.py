"""Every image becomes upright 8-bit pixels or a reason; no copy of the picture hides in what is written."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from torchvision import transforms

from pipeline.errors import SampleError
from pipeline.pictures.formats import kind_of
from pipeline.pictures.picture import Picture, decode, decode_rgb, encode, resize_and_crop, rgb_of, stored
from tests.support.pictures import LIMIT, SRGB, exif_with, reopened
from tests.support.samples import image_bytes, noise


def pixels_of(data: bytes, suffix: str = "jpg") -> np.ndarray:
    return decode(data, max_pixels=LIMIT, suffix=suffix).pixels


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


# ---- encoding


def test_jpegs_of_unknown_coding_are_written_at_quality_95_without_chroma_subsampling() -> None:
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
        "import hashlib, numpy as np; from pipeline.pictures.picture import Picture, encode\n"
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


def test_every_real_upload_decodes_as_its_manifest_says(native_uploads: Path) -> None:
    import tarfile

    folder = native_uploads
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
                    seen = picture.upright
                    if upright.mode == "RGBA" and channels == 2:  # grey of 16 bits and alpha
                        seen = seen[:, :, [0, 0, 0, 1]]
                    assert (np.asarray(upright).reshape(seen.shape) == seen).all(), entry["path"]
                written = encode(picture, how="lossless", metadata="keep")[0]
                assert (decode(written, max_pixels=LIMIT, suffix="png").pixels == picture.pixels).all()
            else:
                with pytest.raises(SampleError):
                    decode(data, max_pixels=100_000_000, suffix="jpg")


def test_a_real_position_is_gone_after_strip_gps(native_uploads: Path) -> None:
    import tarfile

    with tarfile.open(native_uploads / "native-uploads.tar") as tar:
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


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_open_picture_gives_the_surrogate_what_its_file_does(
    kind: str, suffix: str, channels: int, orientation: int
) -> None:
    if (kind, channels) in (("JPEG", 2), ("JPEG", 4), ("WEBP", 2)):
        pytest.skip("the format has no such pixels")
    data = image_bytes(noise(64, 90, channels), kind, exif=exif_with(Orientation=orientation))
    picture = decode(data, max_pixels=10_000, suffix=suffix)
    for at_least in (64, 33, 32, 8):
        found = rgb_of(picture, at_least=at_least)
        wanted = decode_rgb(data, at_least=at_least, max_pixels=10_000, suffix=suffix)
        assert (found is None) == (wanted.shape[:2] != picture.upright_size)
        assert found is None or np.array_equal(found, wanted)
