"""Encoded bytes <-> pictures: what is decoded, what is refused, and what is kept of a file when it is written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import SampleError
from pipeline.metadata import clean_exif, clean_xmp, orientation_of
from pipeline.padded import image_of, pixels_of
from pipeline.records import Reason
from pipeline.settings import Metadata, jpeg_quality

# Sizes are checked here, against --max-pixels, before anything is decoded; Pillow's own limit would refuse what
# the user allows, and its warning would come from the middle of a thread.
Image.MAX_IMAGE_PIXELS = None

DECODED = ("JPEG", "PNG", "WEBP", "GIF")
_JPEG_QUALITY = 95
_MAX_JPEG_EXIF = 65_533  # bytes of one JPEG segment
_MAX_JPEG_XMP = 65_533 - 29
_MAX_RESIZED_PIXELS = 1 << 22
_STARTS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (4, b"ftyp", "HEIC, AVIF or video"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\x1a\x45\xdf\xa3", "video"),
    (0, b"\0\0\x01\xba", "video"),
    (8, b"AVI ", "video"),
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A decoded image and what is needed to write it back.

    pixels  uint8 [H, W, C], upright, perhaps read-only; C is 1 (grey), 2 (grey, alpha), 3 (RGB, mostly padded, see
            pipeline/padded.py) or 4 (RGBA)
    format  JPEG, PNG or WEBP: what it is written as unless told otherwise
    exif, xmp, icc  metadata of the upright picture, without thumbnails; icc fits C
    """

    pixels: NDArray[np.uint8]
    format: str
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None


def kind_of(data: bytes) -> str | None:
    """What picture or video format `data` begins like; None if it looks like none."""
    for offset, mark, kind in _STARTS:
        if data.startswith(mark, offset) and (kind != "WEBP" or data.startswith(b"RIFF")):
            return kind
    if data[:2] == b"BM" and data[6:10] == bytes(4) and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[:4] in (b"\0\0\x01\0", b"\0\0\x02\0"):
        count = int.from_bytes(data[4:6], "little")
        if int.from_bytes(data[18:22], "little") == 6 + 16 * count > 6:
            return "ICO"
    return None


_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)}


def decode(data: bytes, *, max_pixels: int, suffix: str) -> Picture:
    """The picture in `data`, whatever its name says; a still GIF becomes what `suffix` (e.g. "png") names.

    Grey stays grey, 16 bits become 8 (x / 257, rounded; colour: the upper byte), palettes become RGB or RGBA,
    CMYK becomes RGB. Of a multi-picture JPEG the first is taken, the rest dropped.
    Raises SampleError: EMPTY, UNSUPPORTED_FORMAT, TOO_MANY_PIXELS (before anything is decoded), ANIMATED,
    UNDECODABLE.
    """
    with _around_pillow():
        image = _opened(data, max_pixels)
        image.load()
        exif, xmp = _metadata(image)
        upright = _upright(image, exif, xmp)
        plain = upright.mode == "RGB" and image.info.get("transparency") is None
        pixels = pixels_of(upright) if plain else _pixels(upright)
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        if kind == "GIF":
            kind = {"png": "PNG", "webp": "WEBP"}.get(suffix.rpartition(".")[2].lower(), "JPEG")
        return Picture(
            pixels,
            kind,
            exif=clean_exif(exif, keep_gps=True) if exif else None,
            icc=_fitting_icc(image.info.get("icc_profile"), pixels.shape[2]),
            xmp=clean_xmp(xmp, keep_gps=True) if xmp else None,
        )


def decode_rgb(data: bytes, *, at_least: int, max_pixels: int, suffix: str) -> NDArray[np.uint8]:
    """Upright RGB pixels for a surrogate, uint8 [H, W, 3]; the same refusals as `decode`.

    JPEGs come at the smallest DCT scale whose shorter side is still >= `at_least`. Grey is repeated; alpha is
    dropped, not laid over a background, because that is what a reader that converts to RGB sees.
    """
    with _around_pillow():
        image = _opened(data, max_pixels)
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        image.load()
        pixels = _pixels(_upright(image, *_metadata(image)))
    if pixels.shape[2] <= 2:
        return np.repeat(pixels[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def encode(picture: Picture, *, how: str, metadata: Metadata) -> tuple[bytes, str | None]:
    """The picture's file, and the suffix that it must have (None: as it was).

    how       same (JPEG quality 95, 4:4:4; PNG; WebP lossless) | lossless (PNG) | jpeg:QUALITY (4:4:4)
    metadata  keep | strip-gps | strip; a colour profile is always kept. EXIF or XMP that outgrow what a JPEG
              can hold are left out.
    Equal pictures give equal bytes. Raises SampleError UNSUPPORTED_FORMAT for transparency in a JPEG or a side
    that the format cannot hold.
    """
    quality = jpeg_quality(how)
    kind = picture.format if how == "same" else "PNG" if how == "lossless" else "JPEG"
    if kind == "JPEG" and picture.pixels.shape[2] in (2, 4):
        raise SampleError(Reason.UNSUPPORTED_FORMAT, "a JPEG cannot keep the picture's transparency")
    side = {"JPEG": 65_500, "WEBP": 16_383}.get(kind, 1 << 31)
    if max(picture.pixels.shape[:2]) > side:
        raise SampleError(Reason.UNSUPPORTED_FORMAT, f"a side is longer than the {side} pixels of {kind}")
    options = _metadata_options(picture, kind, metadata)
    if kind == "JPEG":
        options |= {"quality": quality or _JPEG_QUALITY, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    pixels = picture.pixels[:, :, 0] if picture.pixels.shape[2] == 1 else picture.pixels
    buffer = io.BytesIO()
    with _around_pillow():
        image_of(pixels, rgbx=kind == "JPEG").save(buffer, kind, **options)
    return buffer.getvalue(), {"same": None, "lossless": "png"}.get(how, "jpg")


def resize_and_crop(picture: Picture, shorter: int = 256, side: int = 224) -> Picture:
    """The shorter side made `shorter` (bilinear), then the centre `side` x `side`, as the paper's code does.

    Smaller pictures are enlarged. Source: the transforms of Zhang et al. 2023 (torchvision's Resize, CenterCrop).
    """
    height, width, channels = picture.pixels.shape
    full = [int(shorter * length / min(height, width)) for length in (height, width)]
    top, left = (int(round((length - side) / 2)) for length in full)
    image = image_of(picture.pixels[:, :, 0] if channels == 1 else picture.pixels)
    if full[0] * full[1] <= _MAX_RESIZED_PIXELS:
        resized = image.resize((full[1], full[0]), Image.Resampling.BILINEAR)
        resized = resized.crop((left, top, left + side, top + side))
    else:  # 60,000 x 1 pixels must not become 15,000,000 x 256: compute the part that stays
        y, x = height / full[0], width / full[1]
        box = (left * x, top * y, (left + side) * x, (top + side) * y)
        resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    pixels = pixels_of(resized) if channels == 3 else np.asarray(resized).reshape(side, side, channels)
    return replace(picture, pixels=pixels)


@contextmanager
def _around_pillow() -> Iterator[None]:
    """Whatever goes wrong in a codec is the sample's fault, except for want of memory."""
    try:
        yield
    except (SampleError, MemoryError):
        raise
    except Exception as error:
        detail = str(error).partition("\n")[0][:200]
        raise SampleError(Reason.UNDECODABLE, f"{type(error).__name__}: {detail}") from error


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image's header, read and judged; no pixel is decoded yet."""
    if not data:
        raise SampleError(Reason.EMPTY, "the member has no bytes")
    kind = kind_of(data)
    if kind not in DECODED:
        raise SampleError(Reason.UNSUPPORTED_FORMAT, f"the bytes are {kind or 'no image'}, not JPEG, PNG or WebP")
    if kind == "WEBP":
        _check_size(_webp_size(data), max_pixels)  # opening one allocates its canvas
    image = Image.open(io.BytesIO(data), formats=(kind,))
    if min(image.size) < 1:
        raise SampleError(Reason.UNDECODABLE, f"{image.size[0]}x{image.size[1]} pixels")
    _check_size(image.size, max_pixels)
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise SampleError(Reason.ANIMATED, f"{kind} with more than one frame")
    return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise SampleError(
            Reason.TOO_MANY_PIXELS, f"{size[0]}x{size[1]} pixels are more than --max-pixels {max_pixels:,}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP's header; zeros if it has none."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _metadata(image: Image.Image) -> tuple[bytes | None, bytes | None]:
    """Raw (EXIF, XMP) of a loaded image."""
    exif = image.info.get("exif")
    if exif is None and isinstance(text := image.info.get("Raw profile type exif"), str):
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))  # how ImageMagick puts EXIF into a PNG
        except ValueError:
            exif = None
    xmp = image.info.get("xmp")
    return exif if isinstance(exif, bytes) else None, xmp if isinstance(xmp, bytes) else None


def _upright(image: Image.Image, exif: bytes | None, xmp: bytes | None) -> Image.Image:
    turn = _TURNS.get(orientation_of(exif, xmp)) if exif or xmp else None
    return image if turn is None else image.transpose(turn)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [H, W, C] of a loaded image of any mode."""
    transparent = image.info.get("transparency") is not None
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        wide = np.asarray(image).astype(np.int32)
        grey = ((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8)
        if not transparent:
            return grey[:, :, None]
        opaque = (wide != image.info["transparency"]) * np.uint8(255)
        return np.stack([grey, opaque], axis=2)
    if image.mode in ("1", "L"):
        mode = "LA" if transparent else "L"
    elif image.mode in ("RGB", "P"):
        palette_alpha = image.palette is not None and image.palette.mode == "RGBA"
        mode = "RGBA" if transparent or palette_alpha else "RGB"
    else:
        mode = {"LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}.get(image.mode, "RGB")
    pixels: NDArray[np.uint8] = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _fitting_icc(icc: object, channels: int) -> bytes | None:
    """The colour profile, if it speaks of the colours that the pixels have."""
    if not isinstance(icc, bytes) or len(icc) < 128:
        return None
    return icc if icc[16:20] == (b"GRAY" if channels <= 2 else b"RGB ") else None


def _metadata_options(picture: Picture, kind: str, metadata: Metadata) -> dict[str, Any]:
    """Options of Pillow's `save` that carry what is kept of EXIF, XMP and ICC."""
    exif, xmp = picture.exif, picture.xmp
    if metadata == "strip":
        exif = xmp = None
    elif metadata == "strip-gps":
        exif = clean_exif(exif, keep_gps=False) if exif else None
        xmp = clean_xmp(xmp, keep_gps=False) if xmp else None
    if kind == "JPEG":
        exif = exif if exif and len(exif) <= _MAX_JPEG_EXIF else None
        xmp = xmp if xmp and len(xmp) <= _MAX_JPEG_XMP else None
    options: dict[str, Any] = {"icc_profile": picture.icc, "exif": exif}
    if kind == "PNG" and xmp:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp:
        options["xmp"] = xmp
    return {name: value for name, value in options.items() if value}
