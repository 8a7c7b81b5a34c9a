"""Which member is the image, and that nothing leaves beside it that a reader could open as a picture."""

from __future__ import annotations

import base64
import gzip
import io
import json

import numpy as np
import pytest

from pipeline.errors import Reason, SampleError, SettingsError
from pipeline.pictures.members import check_sidecars, image_suffix
from pipeline.records import Sample
from pipeline.settings import Settings
from tests.support.samples import image_bytes, noise

PNG = image_bytes(noise(9, 9))


def checked(members: dict[str, bytes], *keep: str) -> str:
    sample = Sample("k", members)
    settings = Settings(keep_sidecar=keep)
    found = image_suffix(sample, settings.keep_sidecar)
    check_sidecars(sample, found, settings.keep_sidecar)
    return found


def copies() -> dict[str, bytes]:
    """Second copies by the names that webdataset's decoder and other common readers open, and by harmless ones."""
    names = {"ppm": "PPM", "tga": "TGA", "pcx": "PCX", "sgi": "SGI", "dds": "DDS", "bmp": "BMP", "tiff": "TIFF"}
    made: dict[str, bytes] = {}
    for suffix, kind in {**names, "gif": "GIF", "jp2": "JPEG2000", "avif": "AVIF", "eps": "EPS"}.items():
        data = image_bytes(noise(9, 9), kind)
        made |= {suffix: data, suffix.upper(): data, f"{suffix}.gz": gzip.compress(data), f"{suffix}.txt": data}
    buffer = io.BytesIO()
    np.save(buffer, noise(9, 9))
    arrays = ("npy", "npz", "pkl", "pickle", "pyd", "pth", "pt", "ten", "mp", "msgpack", "cbor", "h5")
    made |= dict.fromkeys(arrays, buffer.getvalue())
    made |= dict.fromkeys(("heic", "svg", "mp4", "webm", "zip", "tar", "exr", "raw", "html", "unheard-of"), b"anything")
    made |= {"png.gz": gzip.compress(PNG), "json.gz": gzip.compress(b"{}"), "seg.png": PNG, "b": PNG, "notes.txt": PNG}
    made["json"] = json.dumps({"imageData": base64.b64encode(PNG).decode()}).encode()
    return made


COPIES = copies()


@pytest.mark.parametrize("suffix", sorted(COPIES))
def test_no_second_copy_passes_beside_the_image(suffix: str) -> None:
    with pytest.raises(SampleError) as error:
        checked({"cls": b"1", "jpg": PNG, suffix: COPIES[suffix]})
    assert error.value.reason in (Reason.SEVERAL_IMAGES, Reason.UNKNOWN_SIDECAR)
    assert suffix in error.value.detail


@pytest.mark.parametrize("suffix", ["cls", "JSON", "txt", "left.caption", "csv", "xml", "yaml", "url", "jsonl", "id"])
def test_text_passes(suffix: str) -> None:
    assert checked({suffix: b"a label", "jpg": PNG}) == "jpg"


def test_what_is_vouched_for_passes_and_nothing_else() -> None:
    assert checked({"jpg": PNG, "SEG.png": PNG}, "seg.png") == "jpg"
    assert checked({"image.jpg": PNG, "mask.png": PNG, "npy": b"\x93NUMPY"}, ".mask.PNG", "npy") == "image.jpg"
    with pytest.raises(SampleError, match="members jpg, seg.png, mask.png; --keep-sidecar mask.png passes on a mask"):
        checked({"jpg": PNG, "seg.png": PNG, "mask.png": PNG})
    with pytest.raises(SampleError, match="members jpg, mask.png"):
        checked({"jpg": PNG, "seg.png": PNG, "mask.png": PNG}, "seg.png")
    with pytest.raises(SampleError, match="member pkl is not one of the text formats .*; --keep-sidecar pkl"):
        checked({"jpg": PNG, "pkl": b"", "npy": b""}, "npy")


def test_a_mask_that_was_kept_is_not_taken_for_the_image_by_those_who_read_it() -> None:
    assert image_suffix(Sample("k", {"seg.png": PNG, "jpg": PNG})) == "jpg"
    for members in ({"jpg": PNG, "png": PNG}, {"a.png": PNG, "b.png": PNG}):
        with pytest.raises(SampleError, match="members"):
            image_suffix(Sample("k", members))


@pytest.mark.parametrize("suffix", ["jpg", "PNG", ".webp", "", "."])
def test_the_image_itself_cannot_be_vouched_for(suffix: str) -> None:
    with pytest.raises(SettingsError, match="--keep-sidecar"):
        Settings(keep_sidecar=[suffix])


def test_what_is_kept_is_in_the_fingerprint_in_one_spelling() -> None:
    assert Settings(keep_sidecar=["npy", ".Seg.png", "npy"]).deciding["keep_sidecar"] == ["npy", "seg.png"]
