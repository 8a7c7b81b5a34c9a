"""Inspect image files before any codec sees them: recognise formats, bound decoding cost, take PNGs apart."""

from __future__ import annotations

import base64
import re
import zlib
from typing import Any

from pipeline.errors import Reason, SampleError
from pipeline.pictures.jpeg import jpeg_size

DECODED = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PROFILE_BYTES = 1 << 22  # of a colour profile; monitor profiles have 3 kB, press profiles 3 MB
_MAX_TEXT_BYTES = 1 << 20  # of EXIF and XMP, decompressed
_MAX_PNG_CHUNKS = 1 << 17
_MAX_JPEG_SEGMENTS = 4096
_MAX_JPEG_SCANS = 100  # encoders write about ten; every scan takes a pass over the whole picture
_MAX_JPEG_JUNK = 1 << 16  # bytes between segments, which Pillow skips one by one
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
    (0, b"DDS \x7c\0\0\0", "DDS"),
    (0, b"qoif\0", "QOI"),
    (0, b"\x1a\x45\xdf\xa3", "video"),
    (0, b"\0\0\x01\xba", "video"),
    (8, b"AVI ", "video"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\x89HDF\r\n", "HDF5"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (4, b"1AY&SY", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
)
_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124)}
_NETPBM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\s+)*\d+\s+\d+\s|P7\nWIDTH|P[Ff]\n\d")

# Pictures as text. Runs shorter than a hexadecimal hash or a signed URL cannot hide one.
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f\x7f]")
_DRAWING = re.compile(rb"\s*(?:/\* XPM|#define \w+_width|%!PS|%PDF)")
_SHOWN_IN_TEXT = (b"<svg", b"data:image/", b"data:video/")
_ESCAPED = re.compile(rb"\\(?:u00|x)(?:0[0-8bcef]|1[0-9a-f]|7f)", re.I)
_ENCODED = re.compile(
    rb"(?<![\w+/-])[\w+/-]{40,}(?:(?:\s|\\[rn]|&#1[03];)+[\w+/-]{40,})*(?:(?:\s|\\[rn]|&#1[03];)+[\w+/-]+)?", re.A
)
_NUMBERS = re.compile(rb"(?:\d{1,3}[\s,;\[\]]+)+")
_MIN_ENCODED = 129  # letters
_MAX_ENCODED = 1366  # letters: 1 kB in base64
_MAX_NUMBERS = 1024
_MAX_ESCAPED = 16

_SEGMENT = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # excluding what occurs within a scan: FF 00 and restart markers
_PICTURE_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"))
# chunks that control how a PNG is displayed, and their exact sizes, which leave no room for anything else
_DISPLAY_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"mDCV": 24, b"cLLI": 8}
_DISPLAY_CHUNKS |= {b"pHYs": 9, b"oFFs": 9, b"sTER": 1}


def kind_of(data: bytes) -> str | None:
    """The picture, video, array or archive format that `data` begins like; None if it looks like none."""
    for offset, mark, kind in _STARTS:
        if data.startswith(mark, offset) and (offset != 8 or data.startswith(b"RIFF")):
            return kind
    if data[:2] == b"BM" and data[6:10] == bytes(4) and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[:4] in (b"\0\0\x01\0", b"\0\0\x02\0"):
        count = int.from_bytes(data[4:6], "little")
        if int.from_bytes(data[18:22], "little") == 6 + 16 * count > 6:
            return "ICO"
    return "netpbm" if data[:1] == b"P" and _NETPBM.match(data) else None


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WebP header; zeros if it has none."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def pixels_in(data: bytes) -> int:
    """Width times height by the header of a PNG, JPEG, WebP or GIF; 0 for anything else. Nothing is checked."""
    kind = kind_of(data)
    if kind == "PNG":
        return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
    if kind == "GIF":
        return int.from_bytes(data[6:8], "little") * int.from_bytes(data[8:10], "little")
    sizes = {"WEBP": webp_size, "JPEG": jpeg_size}
    width, height = sizes[kind](data) if kind in sizes else (0, 0)
    return width * height


def is_lossy_webp(data: bytes) -> bool:
    """True if the picture of a WebP file is in a chunk of the lossy kind."""
    at = 12
    while at + 8 <= len(data) and data[at : at + 4] not in (b"VP8 ", b"VP8L"):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return data[at : at + 4] == b"VP8 "


def hidden_in(text: bytes) -> str | None:
    """Why `text` may contain a picture; None if it is plain text without one.

    Plain text has no control characters (any 8-bit encoding is fine). It is searched for drawings (SVG, XPM,
    PostScript), data: URLs, base64 or hexadecimal (of a known format, or 1 kB of anything), escaped bytes, and 1,024
    consecutive numbers up to 255. Numbers with fractions, such as embeddings, are not mistaken for pixels.
    """
    if kind_of(text) is not None:
        return f"is not text ({kind_of(text)})"
    if _CONTROL.search(text):
        return "is not plain text"
    lower = text.lower()
    if _DRAWING.match(text) or any(mark in lower for mark in _SHOWN_IN_TEXT):
        return "contains a drawing or an image URL"
    if len(_ESCAPED.findall(text)) >= _MAX_ESCAPED:
        return "contains escaped bytes"
    for run in _ENCODED.finditer(text):
        letters = re.sub(rb"\\[rn]|&#1[03];|\s", b"", run[0])
        if len(letters) >= _MIN_ENCODED and (len(letters) >= _MAX_ENCODED or _decoded_kind(letters[:64])):
            return f"contains {len(letters):,} characters of base64 or hexadecimal"
    for run in _NUMBERS.finditer(text):
        if len(run[0]) >= 2 * _MAX_NUMBERS:
            numbers = [int(number) for number in re.findall(rb"\d+", run[0])]
            if len(numbers) >= _MAX_NUMBERS and max(numbers) <= 255:
                return f"contains {len(numbers):,} consecutive numbers that may be pixels"
    return None


def _decoded_kind(letters: bytes) -> str | None:
    """The format that base64 or hexadecimal characters decode to, or None."""
    if re.fullmatch(rb"[0-9a-fA-F]{64}", letters):
        return kind_of(bytes.fromhex(letters.decode()))
    return kind_of(base64.b64decode(letters, b"-_"))


def check_cost(data: bytes, kind: str) -> None:
    """Raise SampleError TOO_COSTLY if opening or decoding would take far longer than the file size suggests."""
    if kind == "JPEG":
        _check_jpeg(data)
    elif kind == "GIF" and len(data) > (1 << 16) + 4 * int.from_bytes(data[6:8], "little") * int.from_bytes(
        data[8:10], "little"
    ):
        raise SampleError(Reason.TOO_COSTLY, f"{len(data):,} bytes are too many for a still GIF of this size")


def _check_jpeg(data: bytes) -> None:
    """Walk through the segments of the first picture up to its scans and, if there may be many, through those."""
    end, scans, components = 2, 0, b""
    for _ in range(_MAX_JPEG_SEGMENTS):
        mark = _SEGMENT.search(data, end)
        if mark is None or data[mark.end() - 1] == 0xD9:
            return
        if not scans and mark.start() - end > _MAX_JPEG_JUNK:
            raise SampleError(Reason.TOO_COSTLY, f"a JPEG with {mark.start() - end:,} bytes between its segments")
        kind, at = data[mark.end() - 1], mark.end()
        end = at + (0 if kind in (0x01, 0xD8) else int.from_bytes(data[at : at + 2], "big"))
        if kind in (0xC0, 0xC1, 0xC9):
            components = data[at + 7 : at + 8]
        if kind != 0xDA:
            continue
        scans += 1
        if scans > _MAX_JPEG_SCANS:
            raise SampleError(Reason.TOO_COSTLY, f"a JPEG with more than {_MAX_JPEG_SCANS} scans")
        if scans == 1 and (data[at + 2 : at + 3] == components or data.count(b"\xff\xda", at) <= _MAX_JPEG_SCANS):
            return  # not progressive, and everything is in the first scan, after which decoders stop
    raise SampleError(Reason.TOO_COSTLY, f"a JPEG with more than {_MAX_JPEG_SEGMENTS:,} segments")


def split_png(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """(A PNG reduced to the picture itself, the contents of its other chunks under Pillow's names).

    The other chunks are kept from Pillow, because it rejects pictures with a large profile or text. "display" holds
    chunks that control how the picture is displayed. Damaged or oversized chunks are omitted.
    Raises SampleError TOO_COSTLY for more than 131,072 chunks.
    """
    view, info = memoryview(data), dict[str, Any](display={})
    picture, at = [view[:8]], 8
    for _ in range(_MAX_PNG_CHUNKS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(kind) < 4 or kind in _PICTURE_CHUNKS:
            picture.append(view[at:end])
        elif end <= len(data) and zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]:
            _note_chunk(info, kind, data[at + 8 : end - 4])
        if kind == b"IEND" or end >= len(data):
            return b"".join(picture), info
        at = end
    raise SampleError(Reason.TOO_COSTLY, f"a PNG with more than {_MAX_PNG_CHUNKS:,} chunks")


def _note_chunk(info: dict[str, Any], kind: bytes, body: bytes) -> None:
    word, _, rest = body.partition(b"\0")
    if _DISPLAY_CHUNKS.get(kind) == len(body):
        info["display"].setdefault(kind, body)
    elif kind == b"iCCP":
        info.setdefault("icc_profile", _unpacked(rest[1:], MAX_PROFILE_BYTES))
    elif kind == b"eXIf":
        info["exif"] = b"Exif\0\0" + body
    elif kind == b"iTXt" and word == b"XML:com.adobe.xmp":
        text = rest[2:].split(b"\0", 2)[-1]
        info["xmp"] = _unpacked(text, _MAX_TEXT_BYTES) if rest[:1] == b"\1" else text
    elif kind in (b"tEXt", b"zTXt") and word == b"Raw profile type exif" and "exif" not in info:
        text = (_unpacked(rest[1:], _MAX_TEXT_BYTES) if kind == b"zTXt" else rest) or b""
        try:
            info["exif"] = bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))  # as written by ImageMagick
        except ValueError:
            return


def _unpacked(data: bytes, limit: int) -> bytes | None:
    unzip = zlib.decompressobj()
    try:
        unpacked = unzip.decompress(data, limit + 1)
    except zlib.error:
        return None
    return unpacked if unzip.eof and len(unpacked) <= limit else None
