"""A JPEG's coding is read from its header, kept when it is written, and a faster codec changes nothing."""

from __future__ import annotations

import io
import itertools
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.errors import SampleError
from pipeline.pictures.jpeg import JpegCoding, decode_pixels, encode_pixels, jpeg_header
from pipeline.pictures.picture import Picture, decode, decode_rgb, encode
from tests.support.data import set_at_hand
from tests.support.pictures import LIMIT, SRGB, exif_with
from tests.support.samples import image_bytes, noise

PHOTO = (np.add.outer(np.arange(45), np.arange(67))[:, :, None] + np.array([0, 60, 120])).astype(np.uint8)


def coding_of(data: bytes) -> JpegCoding:
    header = jpeg_header(data)
    assert header is not None
    assert header.coding is not None
    return header.coding


def pillow(data: bytes) -> Any:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def check_equal_to_pillow(data: bytes, name: str = "") -> bool:
    """True if the faster codec took the file; its pixels and its coding must then be Pillow's."""
    header = jpeg_header(data)
    pixels = None if header is None else decode_pixels(data, header)
    if header is None or pixels is None:
        return False
    image = pillow(data)
    seen = np.asarray(image)
    assert (pixels == (seen if seen.ndim == 3 else seen[:, :, None])).all(), name
    assert (header.width, header.height) == image.size, name
    assert header.coding is not None
    tables = [image.quantization[table] for *_, table in image.layer]
    assert [list(table) for table in header.coding.tables] == [[min(step, 255) for step in one] for one in tables], name
    assert header.coding.progressive == bool(image.info.get("progressive")), name
    return True


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [25, 75, 95, 100])
def test_what_pillow_was_told_is_read_from_its_file_and_written_again(channels: int, quality: int) -> None:
    pixels = np.ascontiguousarray(PHOTO[:, :, :channels])
    choices = itertools.product((0, 1, 2), (False, True), (False, True), (0, 3))
    for subsampling, progressive, optimize, restart in choices:
        options = {"quality": quality, "progressive": progressive, "optimize": optimize}
        data = image_bytes(pixels, "JPEG", **options, subsampling=subsampling, restart_marker_blocks=restart)
        coding = coding_of(data)
        assert coding.quality == quality
        assert (coding.progressive, coding.optimised) == (progressive, optimize or progressive)
        assert (coding.restart, coding.subsampling) == (restart, subsampling if channels == 3 else 0)
        assert check_equal_to_pillow(data)
        if channels == 3:
            assert encode_pixels(pixels, coding) == data
        assert encode_pixels(pixels, coding) == image_bytes(
            pixels,
            "JPEG",
            qtables=[list(table) for table in coding.tables[:2]],
            subsampling=coding.subsampling,
            progressive=coding.progressive,
            optimize=coding.optimised,
            restart_marker_blocks=restart,
        )


def test_tables_of_no_quality_are_kept_step_by_step() -> None:
    tables = [list(range(1, 65)), list(range(64, 0, -1)), [7] * 64]
    data = image_bytes(PHOTO, "JPEG", qtables=tables, subsampling=1)
    coding = coding_of(data)
    assert coding == JpegCoding(tuple(map(tuple, tables)), 1)
    assert coding.quality is None
    picture = decode(data, max_pixels=LIMIT, suffix="jpg")
    again = encode(picture, how="same", metadata="keep")[0]
    assert coding_of(again) == coding
    assert [list(table) for table in pillow(again).quantization.values()] == tables
    assert abs(len(again) - len(data)) < 0.03 * len(data)


@pytest.mark.parametrize(("sampling", "written"), [((4, 1), 1), ((1, 2), 0), ((2, 2), 2), ((1, 4), 0)])
def test_colour_that_pillow_cannot_write_as_it_came_gets_more_room(sampling: tuple[int, int], written: int) -> None:
    data = bytearray(image_bytes(PHOTO, "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = 16 * sampling[0] + sampling[1]  # brightness of the first component; the scan no longer fits
    assert coding_of(bytes(data)).subsampling == written


def test_finer_tables_have_no_step_above_those_of_the_quality() -> None:
    coarse, fine = JpegCoding.of_quality(40), JpegCoding.of_quality(85)
    assert coarse.finer(85) == fine
    assert fine.finer(40) == fine
    mixed = JpegCoding(((1,) * 32 + (255,) * 32, *coarse.tables[1:]), 2, restart=4)
    finer = mixed.finer(85)
    assert finer.tables[0] == (1,) * 32 + fine.tables[0][32:]
    assert (finer.subsampling, finer.restart, finer.unsampled.subsampling) == (2, 4, 0)


def test_damaged_and_odd_files_are_left_to_pillow() -> None:
    data = image_bytes(noise(40, 50), "JPEG", quality=90)
    scan = data.index(b"\xff\xda")
    odd = {
        "half of it": data[: len(data) // 2],
        "no end": data[:-2],
        "half and an end": data[: len(data) // 2] + b"\xff\xd9",
        "junk between segments": data[:20] + b"junk" + data[20:],
        "only a header": data[:scan],
        "no start of scan": data[:scan] + b"\xff\xd9",
        "cmyk": image_bytes(noise(9, 9, 4)[:, :, :4], "PNG"),
        "rgb": image_bytes(PHOTO, "JPEG", keep_rgb=True),
    }
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(buffer, "JPEG")
    odd["cmyk"] = buffer.getvalue()
    for name, content in odd.items():
        assert not check_equal_to_pillow(content), name
    for name in ("half of it", "no end", "only a header"):
        with pytest.raises(SampleError, match="undecodable|truncated|Truncated|image file"):
            decode(odd[name], max_pixels=LIMIT, suffix="jpg")
    for name in ("half and an end", "junk between segments", "cmyk", "rgb"):
        picture = decode(odd[name], max_pixels=LIMIT, suffix="jpg")
        assert (picture.pixels == np.asarray(pillow(odd[name]).convert("RGB"))).all(), name
    for name in ("cmyk", "rgb"):
        written = encode(decode(odd[name], max_pixels=LIMIT, suffix="jpg"), how="same", metadata="keep")[0]
        assert coding_of(written) == JpegCoding.of_quality(95)


def test_metadata_goes_with_the_same_coding() -> None:
    options = {"quality": 83, "subsampling": 2, "progressive": True}
    data = image_bytes(PHOTO, "JPEG", exif=exif_with(Orientation=6), icc_profile=SRGB, dpi=(300, 300), **options)
    picture = decode(data, max_pixels=LIMIT, suffix="jpg")
    assert picture.coding == coding_of(image_bytes(PHOTO, "JPEG", **options))
    assert (picture.pixels == np.asarray(pillow(data))).all()
    assert (picture.orientation, picture.icc) == (6, SRGB)
    written = encode(picture, how="same", metadata="keep")[0]
    assert coding_of(written) == picture.coding
    assert pillow(written).info["dpi"] == (300, 300)


def test_the_coding_is_only_kept_where_the_output_is_to_be_the_same() -> None:
    picture = decode(image_bytes(PHOTO, "JPEG", quality=60), max_pixels=LIMIT, suffix="jpg")
    assert encode(picture, how="jpeg:95", metadata="keep")[0] == image_bytes(
        picture.pixels, "JPEG", quality=95, subsampling=0
    )
    assert encode(Picture(picture.pixels, "JPEG"), how="same", metadata="keep")[0] == image_bytes(
        picture.pixels, "JPEG", quality=95, subsampling=0
    )


def test_a_lossy_webp_stays_lossy_and_a_lossless_one_lossless() -> None:
    for channels, options in itertools.product((3, 4), ({"quality": 80}, {"lossless": True})):
        data = image_bytes(noise(33, 40, channels), "WEBP", **options)
        picture = decode(data, max_pixels=LIMIT, suffix="webp")
        assert picture.is_lossy == ("quality" in options)
        again = decode(encode(picture, how="same", metadata="keep")[0], max_pixels=LIMIT, suffix="webp")
        assert again.is_lossy == picture.is_lossy
        assert again.pixels.shape == picture.pixels.shape
        assert picture.is_lossy or (again.pixels == picture.pixels).all()


def test_an_embedded_picture_is_the_same_through_either_codec() -> None:
    plain = image_bytes(noise(50, 61), "JPEG", quality=90)
    tagged = image_bytes(noise(50, 61), "JPEG", quality=90, exif=exif_with(Artist="A"))  # which Pillow opens
    for at_least in (20, 32, 224):
        first = decode_rgb(plain, at_least=at_least, max_pixels=LIMIT, suffix="jpg")
        assert (first == decode_rgb(tagged, at_least=at_least, max_pixels=LIMIT, suffix="jpg")).all()


def files_at_hand() -> Iterator[tuple[str, bytes]]:
    for name in ("native", "imagenette"):
        for path in sorted(set_at_hand(name).glob("*.tar")):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile():
                        yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.jp*g")):
        yield path.name, path.read_bytes()


def test_every_jpeg_at_hand_is_decoded_to_pillows_pixels() -> None:
    jpegs = {name: data for name, data in files_at_hand() if data.startswith(b"\xff\xd8\xff")}
    left = {name for name, data in jpegs.items() if not check_equal_to_pillow(data, name)}
    assert len(jpegs) > 1000
    assert len(left) < 10  # CMYK and cut files


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}])
@pytest.mark.parametrize(("quality", "subsampling"), [(92, 0), (93, 0), (95, 0), (98, 0), (100, 0), (100, 1)])
def test_noise_at_fine_qualities_is_written_with_its_metadata(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], quality: int, subsampling: int
) -> None:
    black_and_white = np.where(noise(400, 400) < 128, 0, 255).astype(np.uint8)
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 22)  # Pillow alone has no room to write the original
    more = {"quality": quality, "subsampling": subsampling, "exif": exif_with(Artist="me")} | options
    data = image_bytes(black_and_white, "JPEG", **more)
    monkeypatch.undo()
    picture = decode(data, max_pixels=1 << 20, suffix="jpg")
    usual = ImageFile.MAXBLOCK
    again, _ = encode(picture, how="same", metadata="keep")
    assert usual == ImageFile.MAXBLOCK
    assert len(again) > 2 * 400 * 400
    assert jpeg_header(again).coding == jpeg_header(data).coding
