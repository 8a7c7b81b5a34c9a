"""Encoded bytes <-> pictures: what is decoded, what is refused, and what is kept when writing."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import Reason, SampleError
from pipeline.pictures.deep_png import deep_png, deep_samples, png_chunk
from pipeline.pictures.formats import DECODED, check_cost, is_lossy_webp, kind_of, split_png, webp_size
from pipeline.pictures.jpeg import QUALITY, JpegCoding, JpegHeader, decode_pixels, encode_pixels, jpeg_header
from pipeline.pictures.metadata import clean_exif, clean_icc, clean_xmp, orientation_of, with_orientation
from pipeline.settings import Metadata, jpeg_quality

# Sizes are checked against --max-pixels before anything is decoded; Pillow's own limit might refuse what the user
# allows. Its other warnings (broken EXIF, odd palettes) do not help users.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

_WEBP_QUALITY = 95  # of a lossy WebP, which does not say its own; bench_sizes.py shows what it keeps of deltas
_MAX_JPEG_EXIF = 65_533  # bytes of one JPEG segment
_MAX_JPEG_XMP = 65_533 - 29
_MAX_RESIZED_PIXELS = 1 << 22
_JFIF = b"JFIF"  # in Picture.display, next to PNG chunk names: density unit (1 byte) and density of a JPEG
_JFIF_AT = 13  # their offset in a file written by Pillow
_PNG_HEADER = 33  # bytes
_SPREAD = {"L;2": (3, 85), "L;4": (15, 17)}  # samples below 8 bits: significant bits, and Pillow's scale factor
_SRGB_GAMMA = range(45_000, 46_001)  # 1/2.2 in gAMA units
_SRGB_CHRM = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@dataclass(frozen=True)
class Picture:
    """A decoded image and what is needed to write it again.

    pixels  uint8 [H, W, C] as they are stored, perhaps read-only; C is 1 (grey), 2 (grey, alpha), 3 (RGB)
            or 4 (RGBA); of samples of 16 bits the upper bytes
    lower   of samples of 16 bits the lower bytes, as `pixels`; a PNG is written with them
    format  JPEG, PNG or WEBP: the output format by default
    exif    cleaned, see clean_exif
    icc     cleaned, see clean_icc; matches C
    xmp     cleaned, see clean_xmp
    display  other display information: PNG chunk -> data, and the density of a JPEG
    orientation  EXIF orientation, 1 to 8: how to turn the pixels upright
    coding  how it was coded, if it is a grey or YCbCr JPEG
    is_lossy  True if its file does not hold pixels exactly
    """

    pixels: NDArray[np.uint8]
    format: str
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    display: Mapping[bytes, bytes] = field(default_factory=dict)
    orientation: int = 1
    coding: JpegCoding | None = None
    is_lossy: bool = False
    lower: NDArray[np.uint8] | None = None

    @property
    def upright(self) -> NDArray[np.uint8]:
        """The upright pixels, as a view."""
        return turned(self.pixels, self.orientation)

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """Upright RGB pixels, uint8 [H, W, 3]: grey is repeated, alpha is dropped."""
        return _rgb(self.upright)

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width when upright."""
        height, width = self.upright.shape[:2]
        return height, width


def turned(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """[H, W, …] turned according to an EXIF orientation, as a view."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def stored(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The inverse of `turned`: brings upright data, such as a delta, into the layout of the stored pixels."""
    return turned(upright, {6: 8, 8: 6}.get(orientation, orientation))


def decode(data: bytes, *, max_pixels: int, suffix: str) -> Picture:
    """Decode the picture in `data`, whatever its name; a still GIF gets the format that `suffix` (e.g. "png") names.

    Grey stays grey, palettes become RGB or RGBA, CMYK becomes RGB. Only the first picture of a multi-picture JPEG is
    used.
    Raises SampleError: EMPTY, UNSUPPORTED_FORMAT, TOO_MANY_PIXELS and TOO_COSTLY (before anything is decoded),
    ANIMATED, UNDECODABLE.
    """
    with _around_pillow():
        header = _checked_header(data, max_pixels)
        known = None if header is None else decode_pixels(data, header)
        if header is not None and known is not None and header.is_plain:
            display = {_JFIF: header.density} if header.density else {}
            return Picture(known, "JPEG", display=display, coding=header.coding, is_lossy=True)
        image, data = _opened(data, max_pixels)
        pixels, lower = _pixels(image, data) if known is None else (known, None)
        exif, xmp = image.info.get("exif"), image.info.get("xmp")
        icc = image.info.get("icc_profile")
        display = dict(image.info.get("display", {}))
        if "jfif_unit" in image.info:
            display[_JFIF] = struct.pack(">BHH", image.info["jfif_unit"], *image.info["jfif_density"])
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        if kind == "GIF":
            kind = {"png": "PNG", "webp": "WEBP"}.get(suffix.rpartition(".")[2].lower(), "JPEG")
        return Picture(
            pixels,
            kind,
            exif=clean_exif(exif, keep_gps=True) if exif else None,
            icc=clean_icc(icc, space=b"GRAY" if pixels.shape[2] <= 2 else b"RGB ") if icc else None,
            xmp=clean_xmp(xmp, keep_gps=True) if xmp else None,
            display=display,
            orientation=orientation_of(exif, xmp) if exif or xmp else 1,
            coding=header.coding if header is not None else None,
            is_lossy=kind == "JPEG" or (kind == "WEBP" and is_lossy_webp(data)),
            lower=lower,
        )


def decode_rgb(data: bytes, *, at_least: int, max_pixels: int, suffix: str) -> NDArray[np.uint8]:
    """Decode to upright RGB pixels for a surrogate, uint8 [H, W, 3]; raises like `decode`.

    JPEGs are decoded at the smallest DCT scale whose shorter side is still >= `at_least`. Grey is repeated; alpha is
    dropped rather than composited, because that is what readers that convert to RGB see.
    """
    with _around_pillow():
        header = _checked_header(data, max_pixels)
        if header is not None and header.is_plain and min(header.width, header.height) < 2 * at_least:
            known = decode_pixels(data, header)
            if known is not None:
                return _rgb(known)
        image, data = _opened(data, max_pixels)
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        return _rgb(turned(_pixels(image, data)[0], orientation_of(image.info.get("exif"), image.info.get("xmp"))))


def rgb_of(picture: Picture, *, at_least: int) -> NDArray[np.uint8] | None:
    """What `decode_rgb` makes of the same file; None where it decodes a JPEG at a smaller scale."""
    if picture.format == "JPEG" and min(picture.pixels.shape[:2]) >= 2 * at_least:
        return None
    return picture.rgb


def _rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(pixels[:, :, :1], 3, axis=2) if pixels.shape[2] <= 2 else np.ascontiguousarray(pixels[:, :, :3])


def squeezed(picture: Picture, side: int) -> NDArray[np.uint8]:
    """The whole upright picture squeezed into a square, RGB uint8 [side, side, 3]; always from its full resolution."""
    return square(picture.rgb, side)


def square(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Squeeze RGB pixels, uint8 [H, W, 3], to uint8 [side, side, 3]."""
    if pixels.shape[:2] == (side, side):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))


def encode(picture: Picture, *, how: str, metadata: Metadata) -> tuple[bytes, str | None]:
    """Encode a picture; returns the file and the suffix it needs (None: unchanged).

    how       same | lossless (PNG) | jpeg:QUALITY (4:4:4). `same` writes a JPEG as `picture.coding` says (without one,
              quality 95, 4:4:4), PNG, and WebP lossless or, if it was lossy, at quality 95
    metadata  keep | strip-gps | strip; orientation, colour profile and other display information are always kept.
              EXIF or XMP too large for a JPEG are dropped.
    Equal pictures give equal bytes. Raises SampleError UNSUPPORTED_FORMAT for transparency or a non-sRGB gamma in a
    JPEG, or a side too long for the format.
    """
    quality = jpeg_quality(how)
    kind = picture.format if how == "same" else "PNG" if how == "lossless" else "JPEG"
    if kind == "JPEG" and picture.pixels.shape[2] in (2, 4):
        raise SampleError(Reason.UNSUPPORTED_FORMAT, "a JPEG cannot keep the picture's transparency")
    if kind == "JPEG" and picture.icc is None and not _is_srgb(picture.display):
        raise SampleError(Reason.UNSUPPORTED_FORMAT, "a JPEG cannot keep the picture's gamma and primaries")
    side = {"JPEG": 65_500, "WEBP": 16_383}.get(kind, 1 << 31)
    if max(picture.pixels.shape[:2]) > side:
        raise SampleError(Reason.UNSUPPORTED_FORMAT, f"a side is longer than the {side} pixels that {kind} allows")
    with _around_pillow():
        data = _encoded(picture, kind, quality, _metadata_options(picture, kind, metadata))
    return _shown(data, kind, picture), {"same": None, "lossless": "png"}.get(how, "jpg")


def _encoded(picture: Picture, kind: str, quality: int | None, options: dict[str, Any]) -> bytes:
    """The file without what `_shown` adds; `quality` of a JPEG overrides its coding."""
    if kind == "JPEG":
        coding = None if quality else picture.coding
        return encode_pixels(picture.pixels, coding or JpegCoding.of_quality(quality or QUALITY), **options)
    if kind == "WEBP":
        options |= {"quality": _WEBP_QUALITY} if picture.is_lossy else {"lossless": True}
        options |= {"exact": True}
    if kind == "PNG" and picture.lower is not None:
        return deep_png(np.left_shift(picture.pixels, 8, dtype=np.uint16) | picture.lower, **options)
    pixels = picture.pixels[:, :, 0] if picture.pixels.shape[2] == 1 else picture.pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def resize_and_crop(picture: Picture, shorter: int = 256, side: int = 224) -> Picture:
    """Resize the shorter side to `shorter` (bilinear), then centre-crop `side` x `side`, as in the paper's code.

    Smaller pictures are enlarged, 16 bits become 8; the stored layout is kept.
    Source: the transforms of Zhang et al. 2023 (torchvision's Resize, CenterCrop).
    """
    upright = picture.upright
    height, width, channels = upright.shape
    full = [int(shorter * length / min(height, width)) for length in (height, width)]
    top, left = (int(round((length - side) / 2)) for length in full)
    image = Image.fromarray(upright[:, :, 0] if channels == 1 else upright)
    if full[0] * full[1] <= _MAX_RESIZED_PIXELS:
        resized = image.resize((full[1], full[0]), Image.Resampling.BILINEAR)
        resized = resized.crop((left, top, left + side, top + side))
    else:  # 60,000 x 1 pixels must not become 15,000,000 x 256: compute only the part that is kept
        y, x = height / full[0], width / full[1]
        box = (left * x, top * y, (left + side) * x, (top + side) * y)
        resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(resized).reshape(side, side, channels)
    pixels = pixels if picture.orientation == 1 else stored(pixels, picture.orientation).copy()
    return replace(picture, pixels=pixels, lower=None)


@contextmanager
def _around_pillow() -> Iterator[None]:
    """Treat any failure in a codec as the sample's fault, except running out of memory."""
    try:
        yield
    except (SampleError, MemoryError):
        raise
    except Exception as error:
        detail = str(error).partition("\n")[0][:200]
        raise SampleError(Reason.UNDECODABLE, f"{type(error).__name__}: {detail}") from error


def _checked_header(data: bytes, max_pixels: int) -> JpegHeader | None:
    """The header of a usual JPEG, with the same checks as `_opened`; None for anything else."""
    if kind_of(data) != "JPEG":
        return None
    header = jpeg_header(data)
    if header is None or header.has_scans:
        check_cost(data, "JPEG")
    if header is not None:
        _check_size((header.width, header.height), max_pixels)
    return header


def _opened(data: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    """Open an image and check its header, without decoding pixels; returns it and the file it reads from."""
    if not data:
        raise SampleError(Reason.EMPTY, "the member is empty")
    kind = kind_of(data)
    if kind not in DECODED:
        raise SampleError(Reason.UNSUPPORTED_FORMAT, f"the content is {kind or 'not an image'}, not JPEG, PNG or WebP")
    if kind == "WEBP":
        _check_size(webp_size(data), max_pixels)  # opening it allocates its canvas
    check_cost(data, kind)
    info: dict[str, Any] = {}
    if kind == "PNG":
        data, info = split_png(data)
    image = Image.open(io.BytesIO(data), formats=(kind,))
    image.info.update(info)
    if min(image.size) < 1:
        raise SampleError(Reason.UNDECODABLE, f"{image.size[0]}x{image.size[1]} pixels")
    _check_size(image.size, max_pixels)
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise SampleError(Reason.ANIMATED, f"{kind} with more than one frame")
    return image, data


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise SampleError(Reason.TOO_MANY_PIXELS, f"{size[0]}x{size[1]} pixels exceed --max-pixels {max_pixels:,}")


def _pixels(image: Image.Image, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Stored pixels of an image in any mode, and their lower bytes, as in Picture; `data` is its file.

    Raises ValueError as deep_samples does.
    """
    clear = image.info.get("transparency") if image.mode in ("1", "L", "I;16", "RGB") else None
    rawmode = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    image.load()
    pixels, lower = _plain(image), None
    deep = deep_samples(data, pixels)
    if deep is not None:
        pixels, lower = (deep >> 8).astype(np.uint8), deep.astype(np.uint8)
    if clear is None:
        return pixels, lower
    # a PNG with one transparent colour: compared here, because Pillow does not compare the file's original samples
    if deep is not None:
        opaque = (deep != clear).any(axis=2)
    else:
        bits, scale = _SPREAD.get(str(rawmode), (255, 1))
        opaque = (pixels != (np.array(clear) & bits) * scale).any(axis=2)
    alpha = opaque[:, :, None] * np.uint8(255)
    return np.concatenate([pixels, alpha], axis=2), None if lower is None else np.concatenate([lower, alpha], axis=2)


def _plain(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [H, W, C] of a loaded image, ignoring a PNG's single transparent colour."""
    if image.mode == "I;16":
        return (np.asarray(image) >> 8).astype(np.uint8)[:, :, None]
    mode = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA", "PA": "RGBA"}.get(
        image.mode, "RGB"
    )
    if image.mode == "P" and ("transparency" in image.info or (image.palette and image.palette.mode == "RGBA")):
        mode = "RGBA"
    pixels: NDArray[np.uint8] = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _is_srgb(display: Mapping[bytes, bytes]) -> bool:
    """True if a reader that assumes sRGB, as for a JPEG without a profile, shows the same picture."""
    if b"cICP" in display:
        return display[b"cICP"][:2] == b"\1\x0d"
    primaries = struct.unpack(">8I", display.get(b"cHRM", struct.pack(">8I", *_SRGB_CHRM)))
    return b"sRGB" in display or (
        int.from_bytes(display.get(b"gAMA", _SRGB_GAMMA[0].to_bytes(4, "big")), "big") in _SRGB_GAMMA
        and all(abs(ours - theirs) <= 1000 for ours, theirs in zip(primaries, _SRGB_CHRM, strict=True))
    )


def _shown(data: bytes, kind: str, picture: Picture) -> bytes:
    """The file with display information added, as far as the format supports it."""
    chunks = dict(picture.display)
    density = chunks.pop(_JFIF, b"")
    if kind == "JPEG":
        density = density or _density(chunks.get(b"pHYs"))
        return data[:_JFIF_AT] + density + data[_JFIF_AT + len(density) :]
    if kind != "PNG":
        return data
    if density and (physical := _physical(density)):
        chunks[b"pHYs"] = physical
    if picture.icc:
        chunks.pop(b"sRGB", None)  # a PNG has one or the other
    made = b"".join(png_chunk(name, body) for name, body in chunks.items())
    return data[:_PNG_HEADER] + made + data[_PNG_HEADER:]


def _density(physical: bytes | None) -> bytes:
    """JPEG density unit and density for a PNG's pHYs, in whole dots per inch; empty if they do not fit."""
    across, down, unit = struct.unpack(">IIB", physical) if physical else (0, 0, 0)
    if unit == 1:
        across, down = round(across * 0.0254), round(down * 0.0254)
    return (
        struct.pack(">BHH", unit, across, down)
        if unit <= 1 and 0 < min(across, down) <= max(across, down) < 65536
        else b""
    )


def _physical(density: bytes) -> bytes | None:
    """A PNG's pHYs for a JPEG's density unit and density; None if they carry no information."""
    unit, across, down = struct.unpack(">BHH", density)
    if unit > 2 or min(across, down) == 0 or (unit, across, down) == (0, 1, 1):
        return None
    scale = (1, 1 / 0.0254, 100)[unit]  # to pixels per metre
    return struct.pack(">IIB", round(across * scale), round(down * scale), min(unit, 1))


def _metadata_options(picture: Picture, kind: str, metadata: Metadata) -> dict[str, Any]:
    """Options for Pillow's `save` with the EXIF, XMP and ICC data to keep."""
    exif, xmp = picture.exif, picture.xmp
    if metadata == "strip":
        exif = xmp = None
    elif metadata == "strip-gps":
        exif = clean_exif(exif, keep_gps=False) if exif else None
        xmp = clean_xmp(xmp, keep_gps=False) if xmp else None
    if kind == "JPEG":
        exif = exif if exif and len(exif) <= _MAX_JPEG_EXIF else None
        xmp = xmp if xmp and len(xmp) <= _MAX_JPEG_XMP else None
    if picture.orientation != orientation_of(exif, xmp):  # the data that contained it was dropped
        in_exif = orientation_of(picture.exif, None) != 1
        turning = with_orientation(picture.orientation, in_exif=in_exif)
        exif, xmp = turning[0] or exif, turning[1] or xmp
    options: dict[str, Any] = {"icc_profile": picture.icc, "exif": exif}
    if kind == "PNG" and xmp:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp:
        options["xmp"] = xmp
    return {name: value for name, value in options.items() if value}
