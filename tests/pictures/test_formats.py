"""What text may hold a picture, and what ordinary labels are not suspected of it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.formats import hidden_in, kind_of
from tests.support.samples import image_bytes, noise

SMALL = image_bytes(noise(12, 12), "JPEG", quality=30)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "DDS"]
LABELS = [
    b"",
    b"3",
    b"BMW is a car\n",
    b"PK fire, BZhang, DDS is a degree, 8BPS, P1 is Hamilton's McLaren",
    "ein Foto von Füßen 🏖 – 写真".encode(),
    "Füße".encode("latin-1"),
    json.dumps({"caption": "a dog", "url": "https://example.com/a/b/c_d-e.jpg", "sha256": "ff0a" + "5" * 60}).encode(),
    json.dumps([{"bbox": [12, 30, 255, 7], "area": 7.5, "id": number} for number in range(400)]).encode(),
    json.dumps({"segmentation": [[float(number) for number in range(3000)]]}).encode(),
    json.dumps({"counts": [int(n) for n in np.random.default_rng(0).integers(0, 4000, 3000)]}).encode(),
    json.dumps({"embedding": np.random.default_rng(0).normal(size=768).tolist()}).encode(),
    b"\n".join(b"%d,%d,cat" % (number, 2 * number) for number in range(5000)),
    b"<annotation><object><name>dog</name><bndbox><xmin>48</xmin></bndbox></object></annotation>",
    " ".join(["pneumonoultramicroscopicsilicovolcanoconiosis"] * 3).encode(),
    b"\\u0092 \\u2019" * 40,
]


def netpbm(kind: str) -> bytes:
    if kind != "PPM":
        return image_bytes(noise(30, 30), kind)
    return b"P3\n# plain\n2 2\n255\n" + b"1 2 3 4 5 6 7 8 9 10 11 12\n"


@pytest.mark.parametrize("text", LABELS, ids=range(len(LABELS)))
def test_ordinary_labels_hold_no_picture(text: bytes) -> None:
    assert hidden_in(text) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_no_text_under_any_name(kind: str) -> None:
    assert hidden_in(netpbm(kind)) is not None


@pytest.mark.parametrize("wrapped", [0, 76, 64])
@pytest.mark.parametrize("code", ["base64", "urlsafe", "hex"])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_encoded_picture_is_found_in_json_and_text(kind: str, code: str, wrapped: int) -> None:
    encode = {"base64": base64.b64encode, "urlsafe": base64.urlsafe_b64encode, "hex": bytes.hex}[code]
    text = encode(netpbm(kind) if kind != "PPM" else image_bytes(noise(9, 9), "PPM"))  # type: ignore[operator]
    text = text if isinstance(text, str) else text.decode()
    if wrapped:
        text = "\n".join(text[at : at + wrapped] for at in range(0, len(text), wrapped))
    assert hidden_in(json.dumps({"version": "4.5", "imageData": text, "imageHeight": 12}).encode()) is not None
    assert hidden_in(f"image: |\n  {text}\nlabel: 1\n".encode()) is not None


def packed(how: str) -> bytes:
    pixels = noise(32, 32)
    buffer = io.BytesIO()
    if how == "npy":
        np.save(buffer, pixels)
    elif how == "npz":
        np.savez(buffer, pixels)
    elif how == "tga":
        Image.fromarray(pixels).save(buffer, "TGA")
    else:
        made = {"gzip": gzip.compress(SMALL), "zlib": zlib.compress(pixels.tobytes()), "raw": pixels.tobytes()}
        return made.get(how) or pickle.dumps(pixels)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["npy", "npz", "tga", "gzip", "zlib", "raw", "pickle"])
def test_arrays_and_packed_files_are_found_as_they_are_and_encoded(how: str) -> None:
    assert hidden_in(packed(how)) is not None
    assert hidden_in(json.dumps({"x": base64.b64encode(packed(how)).decode()}).encode()) is not None


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"pixels": noise(32, 32).tolist()}),
        "\n".join(",".join(map(str, row)) for row in noise(28, 28, 1)[:, :, 0].tolist() * 2),
        json.dumps({"latin": SMALL.decode("latin-1")}),
        str(SMALL),
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        '{"thumb": "data:image/png,%89PNG%0D%0A"}',
        "/* XPM */ static char * x[] = {",
        "#define im_width 9",
        "%!PS-Adobe-3.0 EPSF-3.0",
        "%PDF-1.4",
    ],
)
def test_pictures_drawn_in_text_are_found(text: str) -> None:
    assert hidden_in(text.encode()) is not None


def test_large_texts_are_looked_through_in_linear_time() -> None:
    lines = [b"abc 12, 13, 14, " * 60_000, b"12 " * 300 + b"x", b"a" * 39 + b" ", b"12,"]
    start = time.process_time()
    for line in lines:
        hidden_in(line * (1_000_000 // len(line)))
    assert time.process_time() - start < 3


def test_marks_of_formats_are_those_that_their_writers_leave() -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "DDS"):
        assert kind in str(kind_of(image_bytes(noise(32, 32), kind)))
    assert kind_of(image_bytes(noise(9, 9), "PPM")) == "netpbm"
