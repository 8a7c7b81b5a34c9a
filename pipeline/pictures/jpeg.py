"""How a JPEG is coded, read from its header; and a faster codec than Pillow's where both give the same bits.

simplejpeg decodes to the same pixels, OpenCV encodes to the same bytes: all three contain libjpeg-turbo. What they
refuse or do differently is left to Pillow. Which of them is used depends on the file alone.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile, zigzag_index

# Workers share the CPUs already; a pool of OpenCV's own in each costs more than the work on one picture.
cv2.setNumThreads(0)

Tables = tuple[tuple[int, ...], ...]

QUALITY = 95  # where a file does not say how it was coded
_FULL, _HALF_WIDTH, _HALF = 0, 1, 2  # Pillow's numbers for 4:4:4, 4:2:2 and 4:2:0
_SAMPLING = {
    _FULL: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    _HALF_WIDTH: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    _HALF: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}
_RATIOS = {(1, 1): _FULL, (2, 1): _HALF_WIDTH, (2, 2): _HALF, (4, 1): _HALF_WIDTH}  # the last is 4:1:1: the next finer
_SOS, _DQT, _DHT, _DRI, _COM, _APP0, _APP14 = 0xDA, 0xDB, 0xC4, 0xDD, 0xFE, 0xE0, 0xEE
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all with Huffman codes
_PROGRESSIVE = 0xC2
_MAX_STEP = 255  # libjpeg warns on the terminal of coarser ones in what it writes
_FINE = 8.0  # mean step below which a picture may take more than a byte for each value
_ENLARGING = threading.Lock()
_MAX_SEGMENTS = 64  # before the first scan; cameras and editors write about ten, and more is not hurried


@dataclass(frozen=True)
class JpegCoding:
    """How a grey or YCbCr JPEG is coded.

    tables       quantisation table of each component, 64 steps each, row by row
    subsampling  of colour: 0 = 4:4:4, 1 = 4:2:2, 2 = 4:2:0
    optimised    with Huffman codes made for the picture
    restart      MCUs between restart markers; 0 = none
    """

    tables: Tables
    subsampling: int = _FULL
    progressive: bool = False
    optimised: bool = False
    restart: int = 0

    @classmethod
    def of_quality(cls, quality: int) -> JpegCoding:
        """libjpeg's tables of a quality, 1 to 100, without subsampling."""
        luma, chroma = _standard(quality)
        return cls((luma, chroma, chroma))

    def finer(self, quality: int) -> JpegCoding:
        """The same with no step larger than in libjpeg's tables of this quality."""
        least = zip(self.tables, JpegCoding.of_quality(quality).tables, strict=False)
        return replace(self, tables=tuple(tuple(map(min, ours, theirs)) for ours, theirs in least))

    @property
    def unsampled(self) -> JpegCoding:
        """The same in 4:4:4."""
        return replace(self, subsampling=_FULL)

    @cached_property
    def quality(self) -> int | None:
        """The quality, 1 to 100, of which libjpeg makes these tables; None if there is none."""
        kinds = [_qualities()[min(index, 1)].get(table) for index, table in enumerate(self.tables)]
        return kinds[0] if len(set(kinds)) == 1 else None


@dataclass(frozen=True)
class JpegHeader:
    """What stands before the first scan of a JPEG.

    coding    None for what is written otherwise, such as CMYK and RGB
    density   JFIF's unit (1 byte) and density across and down; empty without JFIF
    is_plain  without segments that may hold EXIF, XMP, a profile or a second picture
    has_scans  True if there may be more than one scan
    """

    width: int
    height: int
    components: int
    coding: JpegCoding | None
    density: bytes
    is_plain: bool
    has_scans: bool


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None for anything unusual, which is Pillow's to judge."""
    frame, density, is_plain = b"", b"", True
    tables, codes, restart, kind, adobe, scanned = b"", b"", 0, 0, b"", b""
    for marker, body in _segments(data):
        if marker == _DQT:
            tables += body
        elif marker == _DHT:
            codes += body
        elif marker in _FRAMES:
            frame, kind = frame + body, marker
        elif marker == _DRI and len(body) == 2:
            restart = int.from_bytes(body, "big")
        elif marker == _APP0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            density = body[7:12]
        elif marker == _SOS:
            scanned = body[:1]
            break
        elif marker != _COM:
            is_plain = False
            if 0xE0 <= marker <= 0xEF:
                adobe = body[:12] if marker == _APP14 else adobe
                continue
            return None
    else:
        return None
    if len(frame) not in (9, 15) or frame[0] != 8 or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = struct.unpack(">HH", frame[1:5])
    usual = bool(density) or (not adobe.startswith(b"Adobe") or adobe[11:] == b"\1") and frame[6:15:3] != b"RGB"
    coding = _coding(frame, kind, tables, codes, restart) if usual and min(width, height) else None
    has_scans = kind == _PROGRESSIVE or scanned != frame[5:6]
    return JpegHeader(width, height, frame[5], coding, density, is_plain, has_scans)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first frame header of a JPEG; zeros if it has none. Nothing else is looked at."""
    for marker, body in _segments(data):
        if marker in _FRAMES and len(body) >= 5:
            height, width = struct.unpack(">HH", body[1:5])
            return width, height
        if marker == _SOS:
            break
    return 0, 0


def decode_pixels(data: bytes, header: JpegHeader) -> NDArray[np.uint8] | None:
    """Pixels of a JPEG, uint8 [H, W, C] with C = 1 or 3, equal to Pillow's; None if Pillow must see to it.

    Files with the slightest damage are among these: Pillow knows which can be read all the same.
    """
    if header.coding is None:
        return None
    colours = "GRAY" if header.components == 1 else "RGB"
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels


def encode_pixels(pixels: NDArray[np.uint8], coding: JpegCoding, **metadata: Any) -> bytes:
    """A JPEG of uint8 [H, W, C] with C = 1 or 3: the bytes that Pillow makes.

    metadata  options of Pillow's `save`, such as exif
    """
    channels = pixels.shape[2]
    if len(coding.tables) > channels:
        coding = replace(coding, tables=coding.tables[:channels])
    quality = coding.quality
    if quality is not None and not metadata:
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, coding.restart]
        options += [cv2.IMWRITE_JPEG_PROGRESSIVE, int(coding.progressive)]
        options += [cv2.IMWRITE_JPEG_OPTIMIZE, int(coding.optimised)]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SAMPLING[coding.subsampling]]
        done, file = cv2.imencode(".jpg", pixels if channels == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        if done:
            return file.tobytes()
    tables = coding.tables[:2] if len(set(coding.tables[1:])) == 1 else coding.tables  # the last is for all others
    metadata |= {"qtables": [list(table) for table in tables], "subsampling": coding.subsampling}
    metadata |= {"progressive": coding.progressive, "optimize": coding.optimised}
    buffer = io.BytesIO()
    with _room_for(pixels, coding):
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(
            buffer, "JPEG", restart_marker_blocks=coding.restart, **metadata
        )
    return buffer.getvalue()


@contextmanager
def _room_for(pixels: NDArray[np.uint8], coding: JpegCoding) -> Iterator[None]:
    """Room for a whole file, which a picture in several scans or with codes of its own is written into at once.

    Pillow has two bytes for a pixel, which is too little for black and white noise at fine qualities.
    """
    if not (coding.progressive or coding.optimised):
        yield
        return
    with _ENLARGING:
        # noise at quality 100 takes two thirds of this
        most = (2 if np.mean(coding.tables[0]) < _FINE else 1) * pixels.size + 65_536
        usual, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, most
        try:
            yield
        finally:
            ImageFile.MAXBLOCK = usual


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, contents) of the segments up to the first scan; stops at anything that is not one."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at : at + 1] != b"\xff" or len(data) < at + 4:
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 1], data[at + 4 : end]
        at = end


@lru_cache(4096)
def _coding(frame: bytes, kind: int, tables: bytes, codes: bytes, restart: int) -> JpegCoding | None:
    """Coding from the contents of a file's segments; None if they do not fit together."""
    steps = _parsed_tables(tables)
    parts = [frame[at : at + 3] for at in range(6, len(frame), 3)]  # number, sampling (two half bytes), table
    ratio = (1, 1)
    if len(parts) == 3:
        (luma_x, luma_y), *others = [divmod(part[1], 16) for part in parts]
        if others[0] != others[1] or 0 in (*others[0], luma_x, luma_y):
            return None
        ratio = (luma_x // others[0][0], luma_y // others[0][1])
    if any(part[2] not in steps for part in parts):
        return None
    progressive = kind == _PROGRESSIVE
    return JpegCoding(
        tuple(steps[part[2]] for part in parts),
        _RATIOS.get(ratio, _FULL),
        progressive,
        progressive or not _standard_codes().startswith(codes),
        restart,
    )


def _parsed_tables(body: bytes) -> dict[int, tuple[int, ...]]:
    """Number of a quantisation table -> its steps, row by row; empty if damaged."""
    found, at = {}, 0
    while at < len(body):
        size = 64 << (body[at] >> 4)
        steps = np.frombuffer(body[at + 1 : at + 1 + size], ">u2" if size > 64 else np.uint8).tolist()
        if len(steps) != 64 or min(steps) == 0:
            return {}
        found[body[at] & 15] = tuple(min(steps[place], _MAX_STEP) for place in zigzag_index)
        at += 1 + size
    return found


@cache
def _standard(quality: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """libjpeg's tables for brightness and colour at a quality."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    file.seek(0)
    tables = JpegImageFile(file).quantization
    return tuple(tables[0]), tuple(tables[1])


@cache
def _qualities() -> tuple[dict[tuple[int, ...], int], dict[tuple[int, ...], int]]:
    """Tables for brightness and for colour -> the quality."""
    known = [(quality, _standard(quality)) for quality in range(1, 101)]
    return {luma: quality for quality, (luma, _) in known}, {chroma: quality for quality, (_, chroma) in known}


@cache
def _standard_codes() -> bytes:
    """The Huffman codes that libjpeg writes unless it is to optimise them; those of a grey picture come first."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return b"".join(body for marker, body in _segments(file.getvalue()) if marker == _DHT)
