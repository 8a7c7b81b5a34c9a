"""Image metadata (EXIF, XMP, profile), cleaned of anything that would reveal the picture or, if asked, its location.

EXIF and profiles are parsed and rebuilt from what their directories list, so that a thumbnail (an unprotected copy of
the picture) cannot hide in a second directory, a maker note or a gap between values. Only standard tags are kept, and
text must look like text.
"""

from __future__ import annotations

import html
import re
import struct
from typing import NamedTuple

from pipeline.pictures.formats import MAX_PROFILE_BYTES, hidden_in

_PREFIX = b"Exif\0\0"
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}
_ORIENTATION = 0x0112
_EXIF, _GPS, _INTEROP = 0x8769, 0x8825, 0xA005
# Excluded from the tags below: pictures, or offsets into the original file (strips, tiles, sub-directories, embedded
# JPEGs, maker notes), and pointers, which are rebuilt.
_DROPPED = frozenset((0x0111, 0x0117, 0x0144, 0x0145, 0x014A, 0x015B, 0x0201, 0x0202, 0x927C, _EXIF, _GPS, _INTEROP))
_WIDE_TEXTS = range(0x9C9B, 0x9CA0)  # titles as written by Windows
_TIFF_TAGS = (0x000B, *range(0x00FE, 0x0215), 0x4746, 0x4749, 0x8298, *_WIDE_TEXTS)
_EXIF_TAGS = (0x829A, 0x829D, *range(0x8822, 0x8836), *range(0x9000, 0x9500), *range(0xA000, 0xA502))
_UNDERSTOOD = {
    0: frozenset((*_TIFF_TAGS, *_EXIF_TAGS)) - _DROPPED,  # cameras write both kinds of tags in both places
    _EXIF: frozenset((*_TIFF_TAGS, *_EXIF_TAGS)) - _DROPPED,
    _GPS: frozenset(range(0x20)),
    _INTEROP: frozenset((1, 2, 0x1000, 0x1001, 0x1002)),
}
_TRANSFER_FUNCTION = 0x012D
_TEXT_TYPES = (1, 2, 6, 7, 129)
_CHARSETS = (b"ASCII\0\0\0", b"UNICODE\0", b"JIS\0\0\0\0\0", bytes(8))  # prefixes of a user comment
_MAX_PLAIN_BYTES = 64  # longest value that is not inspected
_MAX_XMP_BYTES = 1 << 20
_PICTURE_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"WEBPVP8")
_XMP_PICTURES = (b"xmpgimg", b"thumbnail", b"hdrgm", b"gainmap", b"gimage", b"gdepth", b"container:directory")
_XMP_BASE64_PICTURES = (b"/9j/", b"iVBORw0KGgo", b"UklGR")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ICC_TAGS = {  # maximum bytes of each
    **dict.fromkeys((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"bkpt", b"lumi", b"chad", b"chrm"), 256),
    **dict.fromkeys((b"cicp", b"meas", b"view", b"tech", b"rig0", b"rig2", b"ciis", b"calt"), 256),
    **dict.fromkeys((b"desc", b"cprt", b"dmnd", b"dmdd", b"vued"), 1 << 14),
    **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), 12 + (1 << 17)),
    **{
        tag + index: MAX_PROFILE_BYTES
        for tag in (b"A2B", b"B2A", b"D2B", b"B2D", b"pre")
        for index in (b"0", b"1", b"2")
    },
    b"gamt": MAX_PROFILE_BYTES,
}
_ICC_TEXTS = (b"desc", b"cprt", b"dmnd", b"dmdd", b"vued")
_ICC_HEADER = 128
_CONTROLS = bytes((*range(32), 127))


class _Entry(NamedTuple):
    tag: int
    type: int
    number: int  # number of values of this type
    value: bytes


_Directories = dict[int, list[_Entry]]  # 0 for the first, otherwise the tag that points to it


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """Orientation, 1 to 8, from EXIF or else XMP; 1 if neither has a valid value."""
    order, directories = _parsed(exif or b"")
    for entry in directories.get(0, []):
        if entry.tag == _ORIENTATION:
            size = _SIZES[entry.type]
            value = int.from_bytes(entry.value[:size], "little" if order == "<" else "big")
            return value if 1 <= value <= 8 else 1
    match = _XMP_ORIENTATION.search(xmp or b"")
    return int(match[1]) if match and 1 <= int(match[1]) <= 8 else 1


def with_orientation(orientation: int, *, in_exif: bool) -> tuple[bytes | None, bytes | None]:
    """(EXIF, XMP) that contain only the orientation; one of the two is None."""
    if in_exif:
        entry = _Entry(_ORIENTATION, 3, 1, struct.pack("<H", orientation))
        return _PREFIX + b"II" + struct.pack("<HI", 42, 8) + _written({0: [entry]}, 0, 8, "<"), None
    rdf = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    turned = f'<rdf:Description rdf:about="" tiff:Orientation="{orientation}"/>'
    return None, f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {rdf}>{turned}</rdf:RDF></x:xmpmeta>'.encode()


def clean_exif(exif: bytes, *, keep_gps: bool) -> bytes | None:
    """EXIF without thumbnails, maker notes and unknown tags; None if nothing is left.

    All other values, including the orientation, are unchanged; the block begins with b"Exif\\0\\0".
    """
    order, directories = _parsed(exif)
    if not keep_gps:
        directories.pop(_GPS, None)
    if not any(directories.values()):
        return None
    mark = b"II" if order == "<" else b"MM"
    return _PREFIX + mark + struct.pack(order + "HI", 42, 8) + _written(directories, 0, 8, order)


def clean_xmp(xmp: bytes, *, keep_gps: bool) -> bytes | None:
    """XMP unchanged; None if it may hold pictures, is not UTF-8, is too long, or has a location not to be kept."""
    if len(xmp) > _MAX_XMP_BYTES:
        return None
    try:
        plain = html.unescape(xmp.decode("utf-8")).encode("utf-8", "replace")
    except UnicodeDecodeError:
        return None
    lower = plain.lower()
    if any(mark in lower for mark in _XMP_PICTURES) or any(mark in plain for mark in _XMP_BASE64_PICTURES):
        return None
    if (not keep_gps and b"gps" in lower) or hidden_in(plain):
        return None
    return xmp or None


def clean_icc(icc: bytes, *, space: bytes) -> bytes | None:
    """A colour profile without private tags, gaps and trailing data; None if it is invalid or for another colour space.

    space  b"GRAY" or b"RGB ": the pixels' colour space
    A profile without any of these is returned unchanged.
    """
    size, count = (int.from_bytes(icc[at : at + 4], "big") for at in (0, _ICC_HEADER))
    whole, start = icc[:size], _ICC_HEADER + 4 + 12 * count
    if not start <= size <= min(len(icc), MAX_PROFILE_BYTES) or icc[16:20] != space or icc[36:40] != b"acsp":
        return None
    parts: dict[tuple[int, int], list[bytes]] = {}  # (offset, length) -> the tags that share it
    for entry in (whole[at : at + 12] for at in range(_ICC_HEADER + 4, start, 12)):
        at, length = struct.unpack(">II", entry[4:])
        if at >= start and at + length <= size and _is_understood(entry[:4], whole[at : at + length]):
            parts.setdefault((at, length), []).append(entry[:4])
    if sum(map(len, parts.values())) == count and _leaves_no_gap([(0, start), *sorted(parts)], size):
        return whole
    table, pool = b"", b""
    start = _ICC_HEADER + 4 + 12 * sum(map(len, parts.values()))
    for (at, length), tags in parts.items():
        table += b"".join(tag + struct.pack(">II", start + len(pool), length) for tag in tags)
        pool += whole[at : at + length] + bytes(-length % 4)
    header = whole[4:84] + bytes(_ICC_HEADER - 84)  # clear the old digest and reserved bytes
    body = header + struct.pack(">I", len(table) // 12) + table + pool
    return struct.pack(">I", 4 + len(body)) + body if parts else None


def _is_understood(tag: bytes, value: bytes) -> bool:
    if len(value) > _ICC_TAGS.get(tag, -1):
        return False
    return tag not in _ICC_TEXTS or hidden_in(value.translate(None, _CONTROLS)) is None


def _leaves_no_gap(parts: list[tuple[int, int]], size: int) -> bool:
    """True if the parts (offset, length), in order, cover the whole profile except for padding."""
    end = 0
    for at, length in [*parts, (size, 0)]:
        if at - end > 3:
            return False
        end = max(end, at + length)
    return True


def _parsed(exif: bytes) -> tuple[str, _Directories]:
    """Byte order and directories of an EXIF block; no directories if it is invalid."""
    while exif.startswith(_PREFIX):
        exif = exif[len(_PREFIX) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    if not order or len(exif) < 8:
        return "<", {}
    magic, offset = struct.unpack_from(order + "HI", exif, 2)
    if magic != 42:
        return order, {}
    directories: _Directories = {}
    pending = [(0, offset)]
    left = len(exif)  # otherwise overlapping values could be copied a million times
    while pending:
        name, offset = pending.pop()
        entries = _entries(exif, offset, order)
        left -= sum(len(entry.value) for entry in entries)
        if left < 0:
            return order, {}
        children = {0: (_EXIF, _GPS), _EXIF: (_INTEROP,)}.get(name, ())
        for entry in entries:
            if entry.tag in children and len(entry.value) == 4:
                pending.append((entry.tag, struct.unpack(order + "I", entry.value)[0]))
        directories[name] = [entry for entry in entries if entry.tag in _UNDERSTOOD[name] and _is_plain(entry)]
    return order, directories


def _is_plain(entry: _Entry) -> bool:
    """True if a value cannot hide a picture because it is short, or text."""
    if len(entry.value) <= _MAX_PLAIN_BYTES:
        return True
    if any(mark in entry.value for mark in _PICTURE_MARKS):
        return False
    if entry.type not in _TEXT_TYPES:
        return entry.tag == _TRANSFER_FUNCTION and len(entry.value) <= 1536
    text = entry.value[8:] if entry.value.startswith(_CHARSETS) else entry.value
    if entry.tag in _WIDE_TEXTS or entry.value.startswith(b"UNICODE\0"):
        try:
            wide = text.decode("utf-16-be" if text[:1] == b"\0" else "utf-16-le").rstrip("\0")
        except UnicodeDecodeError:
            return False
        return not hidden_in(wide.encode()) and not hidden_in(text.translate(None, _CONTROLS))
    return hidden_in(text.rstrip(b"\0")) is None


def _entries(exif: bytes, offset: int, order: str) -> list[_Entry]:
    """The readable entries of the directory at `offset`, each tag once."""
    entries: dict[int, _Entry] = {}
    if offset + 2 > len(exif):
        return []
    (count,) = struct.unpack_from(order + "H", exif, offset)
    for start in range(offset + 2, min(offset + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", exif, start)
        size = _SIZES.get(kind, 0) * number
        at = start + 8 if size <= 4 else struct.unpack_from(order + "I", exif, start + 8)[0]
        if size and at + size <= len(exif):
            entries.setdefault(tag, _Entry(tag, kind, number, exif[at : at + size]))
    return list(entries.values())


def _written(directories: _Directories, name: int, at: int, order: str) -> bytes:
    """Bytes of a directory at offset `at`, with its values and sub-directories."""
    children = {0: (_EXIF, _GPS), _EXIF: (_INTEROP,)}.get(name, ())
    entries = list(directories[name])
    entries += [_Entry(tag, 4, 1, b"") for tag in children if directories.get(tag)]
    entries.sort()
    table = struct.pack(order + "H", len(entries))
    pool = b""
    pool_at = at + 2 + 12 * len(entries) + 4
    for entry in entries:
        value = entry.value
        if entry.tag in children:
            value = struct.pack(order + "I", pool_at + len(pool))
            pool += _written(directories, entry.tag, pool_at + len(pool), order)
        elif len(value) > 4:
            value, pool = struct.pack(order + "I", pool_at + len(pool)), pool + value
        pool += bytes(len(pool) % 2)
        table += struct.pack(order + "HHI", entry.tag, entry.type, entry.number) + value.ljust(4, b"\0")
    return table + bytes(4) + pool
