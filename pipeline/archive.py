"""The bytes of a tar archive, plain or packed by gzip -> its members' headers, one after the other, never seeking.

`tarfile` takes a damaged header for the end of the archive and reads extended headers of any size into memory; here
neither goes unnoticed.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, cast

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 16
_READ_BYTES = 4 * _CHUNK
_MAX_READ_BYTES = 256 * _CHUNK  # at once: what a header claims is not believed before it has arrived
_MAX_HEADER_BYTES = 1 << 20  # of one extended header: a long name or pax records
_MAX_PADDING_BYTES = 16 << 20  # looked through behind the end of the archive

FILE, _SPARSE, FOLDER, _OTHER = "file", "sparse file", "folder", "other"
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"S": _SPARSE, b"5": FOLDER, b"D": FOLDER}
_WITHOUT_BODY = b"123456"  # links, devices, folders, fifos: their size field counts no bytes
_KIND_NAMES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "fifo"}
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")


class Damaged(Exception):
    """Nothing after this point of the stream can be trusted."""


class Member(NamedTuple):
    """One member of an archive, as its header describes it."""

    name: str  # bytes that are not UTF-8 are lone surrogates
    kind: str
    size: int  # bytes of its body
    what: str  # the kind, for people


class _Blocks:
    """A stream of which only `read` is known, so that nothing can seek or close it, read in large blocks."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._more = read
        self._block = b""
        self._at = 0

    def starts_with(self, mark: bytes) -> bool:
        """Look ahead; to be called before anything is read."""
        while len(self._block) < len(mark) and (block := self._more(_READ_BYTES)):
            self._block += block
        return self._block.startswith(mark)

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        end = self._at + size
        if end <= len(self._block):
            data = self._block[self._at : end]
            self._at = end
            return data
        parts = [self._block[self._at :]]
        left = size - len(parts[0])
        while left and (block := self._more(max(_READ_BYTES, min(left, _MAX_READ_BYTES)))):
            self._block, self._at = block, min(left, len(block))
            parts.append(block[:left])
            left -= self._at
        if left:
            self._block, self._at = b"", 0
        return b"".join(parts)


class Source:
    """The bytes of the archive, unpacked if need be: as many as asked for, or Damaged."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._blocks = _Blocks(stream.read)
        if self._blocks.starts_with(b"\x1f\x8b"):
            packed = cast(IO[bytes], self._blocks)
            # read1: what was unpacked before the damage must arrive before the error
            self._blocks = _Blocks(gzip.GzipFile(fileobj=packed, mode="rb").read1)

    def _read(self, size: int) -> bytes:
        try:
            return self._blocks.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Damaged(f"is damaged or cut: {error}") from None

    def take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise Damaged(f"ends where {size - len(data):,} more bytes should follow")
        return data

    def skip_body(self, size: int) -> None:
        """Pass over a member's body and its padding."""
        left = size + -size % BLOCK
        while left:
            left -= len(self.take(min(left, _CHUNK)))

    def finish(self) -> None:
        """Look behind the end of the archive: only padding may follow, and gzip's checksum has to hold."""
        for _ in range(_MAX_PADDING_BYTES // _CHUNK):
            data = self._read(_CHUNK)
            if data.count(0) != len(data):
                raise Damaged("goes on behind the end of its archive (two archives joined into one file?)")
            if len(data) < _CHUNK:
                return


def members_of(source: Source) -> Iterator[Member]:
    """Yield header after header; the caller takes or skips the body in between."""
    shared: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    while True:
        block = source.take(BLOCK)
        if block == _ZEROS:
            source.finish()
            return
        size = _size(block)
        kind = block[156:157]
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > _MAX_HEADER_BYTES:
                raise Damaged(f"has an extended header of {size:,} bytes")
            data = source.take(size)
            source.take(-size % BLOCK)
            if kind == b"g":
                shared |= _pax_records(data)
            elif kind == b"L":
                own.setdefault(b"path", data.rstrip(b"\0"))
            elif kind != b"K":
                own |= _pax_records(data)
            continue
        if kind == b"S" and block[482]:
            while source.take(BLOCK)[504]:  # the rest of a sparse file's map
                pass
        records = shared | own if shared or own else {}
        yield _member(block, kind, size, records)
        own = {}


def _member(block: bytes, kind: bytes, size: int, records: dict[bytes, bytes]) -> Member:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    if kind == b"0" and not records:
        return Member(name.decode("utf-8", "surrogateescape"), FILE, size, FILE)
    name = records.get(b"GNU.sparse.name") or records.get(b"path") or name
    if digits := records.get(b"size"):
        if not re.fullmatch(rb"[0-9]{1,18}", digits):
            raise Damaged("has a size that is not a number")
        size = int(digits)
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"  # how tar marked folders before 1988
    what = _KINDS.get(kind, _OTHER)
    if what == FILE and any(record.startswith(b"GNU.sparse.") for record in records):
        what = _SPARSE
    size = 0 if kind in _WITHOUT_BODY else size
    label = _KIND_NAMES.get(kind, what if what != _OTHER else f"member of type {kind!r}")
    return Member(name.decode("utf-8", "surrogateescape"), what, size, label)


def _size(block: bytes) -> int:
    """Size field of a header whose checksum holds."""
    expected = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if expected != unsigned:
        negative = sum(byte > 127 for byte in block[:148] + block[156:])
        if expected != unsigned - 256 * negative:  # some old writers summed signed bytes
            raise Damaged("is no tar archive or damaged: a header's checksum is wrong")
    return _number(block[124:136])


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value >= 1 << 60:
            raise Damaged("has a header with a size that cannot be")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    if digits:
        raise Damaged("is no tar archive or damaged: a header's number is none")
    return 0


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Keyword -> value of pax records `length keyword=value newline`."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        found = _PAX_LENGTH.match(data, position)
        end = position + int(found[1]) if found else 0
        if found is None or end <= found.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise Damaged("has a damaged extended header")
        keyword, _, value = data[found.end() : end - 1].partition(b"=")
        records[keyword] = value
        position = end
    return records
