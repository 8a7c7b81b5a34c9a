"""What an image file says about itself (EXIF, XMP), without what would give the picture or its place away.

EXIF is taken apart and put together again from the values that its directories name. So a thumbnail - a copy of
the picture without protection - cannot hide in a second directory, a maker's note or a gap between values.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_PREFIX = b"Exif\0\0"
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}
_ORIENTATION = 0x0112
_EXIF, _GPS, _INTEROP = 0x8769, 0x8825, 0xA005
# Places that hold pictures, or positions in a file that is no more: strips, tiles, sub-directories, embedded
# JPEGs, Photoshop and XMP blocks, maker's notes, DNG private data.
_DROPPED = frozenset((0x0111, 0x0117, 0x0144, 0x0145, 0x014A, 0x0201, 0x0202, 0x02BC, 0x8649, 0x927C, 0xC634))
_THUMBNAILS = range(0x5012, 0x5035)  # as GDI+ stores them
_PICTURE_MARKS = (b"\xff\xd8\xff", b"\x89PNG\r\n")
_XMP_PICTURES = (b"xmpgimg", b"thumbnail", b"hdrgm", b"gainmap", b"gimage", b"gdepth", b"container:directory")
_XMP_BASE64_PICTURES = (b"/9j/", b"iVBORw0KGgo")
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation(?:="|>))([0-9])')


class _Entry(NamedTuple):
    tag: int
    type: int
    number: int  # of values of this type
    value: bytes


_Directories = dict[int, list[_Entry]]  # 0 for the first, else the tag that points to it


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """EXIF orientation, 1 to 8, from EXIF or else from XMP; 1 where neither says anything valid."""
    order, directories = _parsed(exif or b"")
    for entry in directories.get(0, []):
        if entry.tag == _ORIENTATION:
            size = _SIZES[entry.type]
            value = int.from_bytes(entry.value[:size], "little" if order == "<" else "big")
            return value if 1 <= value <= 8 else 1
    found = _XMP_ORIENTATION.search(xmp or b"")
    return int(found[2]) if found and 1 <= int(found[2]) <= 8 else 1


def clean_exif(exif: bytes, *, keep_gps: bool) -> bytes | None:
    """EXIF of the upright picture, without thumbnails and maker's notes; None if nothing is left.

    Every other value is the same, bit for bit; the block begins with b"Exif\\0\\0".
    """
    order, directories = _parsed(exif)
    if not directories:
        return None
    first = directories[0]
    for index, entry in enumerate(first):
        if entry.tag == _ORIENTATION:
            first[index] = _Entry(_ORIENTATION, 3, 1, struct.pack(order + "H", 1))
    if not keep_gps:
        directories.pop(_GPS, None)
    if not any(directories.values()):
        return None
    mark = b"II" if order == "<" else b"MM"
    return _PREFIX + mark + struct.pack(order + "HI", 42, 8) + _written(directories, 0, 8, order)


def clean_xmp(xmp: bytes, *, keep_gps: bool) -> bytes | None:
    """XMP of the upright picture; None if it holds pictures, is not UTF-8, or names a place and must not."""
    lower = xmp.lower()
    if any(mark in lower for mark in _XMP_PICTURES) or any(mark in xmp for mark in _XMP_BASE64_PICTURES):
        return None
    if not keep_gps and b"gps" in lower:
        return None
    try:
        xmp.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if b"\0" in xmp else _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) or None


def _parsed(exif: bytes) -> tuple[str, _Directories]:
    """Byte order and directories of an EXIF block; no directories if it is broken."""
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
    left = len(exif)  # values that overlap could otherwise be copied a million times
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
        directories[name] = [entry for entry in entries if not _is_dropped(entry)]
    return order, directories


def _is_dropped(entry: _Entry) -> bool:
    if entry.tag in _DROPPED or entry.tag in _THUMBNAILS or entry.tag in (_EXIF, _GPS, _INTEROP):
        return True  # the pointers are made anew
    return any(mark in entry.value for mark in _PICTURE_MARKS)


def _entries(exif: bytes, offset: int, order: str) -> list[_Entry]:
    """The readable entries of the directory at `offset`; each tag once."""
    found: dict[int, _Entry] = {}
    if offset + 2 > len(exif):
        return []
    (count,) = struct.unpack_from(order + "H", exif, offset)
    for start in range(offset + 2, min(offset + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", exif, start)
        size = _SIZES.get(kind, 0) * number
        at = start + 8 if size <= 4 else struct.unpack_from(order + "I", exif, start + 8)[0]
        if size and at + size <= len(exif):
            found.setdefault(tag, _Entry(tag, kind, number, exif[at : at + size]))
    return list(found.values())


def _written(directories: _Directories, name: int, at: int, order: str) -> bytes:
    """Bytes of a directory that begins at `at`, its values and the directories below it."""
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
