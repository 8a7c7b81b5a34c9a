"""The bytes of a tar archive, plain or gzipped -> its members' headers, one by one, without seeking.

`tarfile` mistakes a damaged header for the end of the archive, reads only the first of several concatenated archives,
and reads extended headers of any size into memory. Here all of these are detected, and after damage, reading resumes at
the next header with a valid checksum.
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
_PART_BYTES = 4096  # at once where bodies are skipped
_MAX_READ_BYTES = 256 * _CHUNK  # at once: a size claimed by a header is not trusted until the bytes arrive
_MAX_HEADER_BYTES = 1 << 20  # limit for one extended header: a long name or pax records
_MAX_PADDING_BYTES = 1 << 20  # after an end mark; more zeros than this indicate lost data
_MAGIC, _MAGIC_AT = b"ustar", 257

FILE, _SPARSE, FOLDER, LABEL, END, _OTHER = "file", "sparse file", "folder", "volume label", "end mark", "other"
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"S": _SPARSE, b"5": FOLDER, b"D": FOLDER, b"V": LABEL}
_WITHOUT_BODY = b"123456"  # links, devices, folders, fifos: their size field counts no bytes
_KIND_NAMES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "fifo"}
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")


class Damaged(Exception):
    """The stream cannot be read beyond this point."""


class _BadHeader(Exception):
    """Something that is not a valid header.

    begun  its bytes, within which another header may start
    """

    def __init__(self, what: str, begun: bytes = b"") -> None:
        super().__init__(what)
        self.begun = begun


class Gap(NamedTuple):
    """A part of the archive that could not be read.

    what  where, how much, and why
    """

    what: str


class Member(NamedTuple):
    """A member as described by its header, or an end mark, after which another archive may follow."""

    name: str  # bytes that are not UTF-8 become lone surrogates
    kind: str
    size: int  # of its body, in bytes
    what: str  # the kind, for people


class _Blocks:
    """Buffers a stream in large blocks; only knows its `read`, so it cannot seek or close it."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._more = read
        self._block = b""
        self._at = 0

    def starts_with(self, mark: bytes) -> bool:
        """Peek at the start; call before reading anything."""
        while len(self._block) < len(mark) and (block := self._more(_READ_BYTES)):
            self._block += block
        return self._block.startswith(mark)

    def unread(self, data: bytes) -> None:
        """Push `data` back, to be read next."""
        self._block, self._at = data + self._block[self._at :], 0

    def discard(self, size: int) -> int:
        """Skip up to `size` bytes of what is buffered; returns how many."""
        found = min(size, len(self._block) - self._at)
        self._at += found
        return found

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end."""
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
    """The archive's bytes, decompressed if needed: exactly as many as requested, or Damaged. `at` is the position."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.at = 0
        self._blocks = self._packed = _Blocks(stream.read)
        if self._blocks.starts_with(b"\x1f\x8b"):
            packed = cast(IO[bytes], self._packed)
            # read1: what was decompressed before the damage must arrive before the error
            self._blocks = _Blocks(gzip.GzipFile(fileobj=packed, mode="rb").read1)

    def _read(self, size: int) -> bytes:
        try:
            data = self._blocks.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            left = sum(map(len, iter(lambda: self._packed.read(_READ_BYTES), b"")))
            at = f"near uncompressed byte {self.at:,}"
            raise Damaged(
                f"is damaged or truncated {at}: {error}; {left:,} more compressed bytes were not read"
            ) from None
        self.at += len(data)
        return data

    def take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise Damaged(f"ends at byte {self.at:,}, with at least {size - len(data):,} bytes missing")
        return data

    def skip_body(self, size: int) -> bytes:
        """Skip a member's body and padding; returns the body's first bytes, up to 512."""
        left = size + -size % BLOCK
        begun = self.take(min(left, BLOCK))
        left -= len(begun)
        while left:
            left -= len(self.take(min(left, _CHUNK)))
        return begun[:size]

    def skip_zeros(self) -> int:
        """Skip whole blocks of zeros, and zeros at the end; returns the number of bytes skipped."""
        start = self.at
        while data := self._read(_CHUNK):
            if data.count(0) != len(data):
                zeros = len(data) - len(data.lstrip(b"\0"))
                self._unread(data[zeros - zeros % BLOCK :])
                break
        return self.at - start

    def has_more(self) -> bool:
        """False at the end of the stream."""
        data = self._read(1)
        self._unread(data)
        return bool(data)

    def find_header(self, begun: bytes) -> bool:
        """Advance to the next valid header at any offset; False if there is none, with the stream then exhausted.

        begun  the bytes taken last, searched again from their second byte
        """
        self._unread(begun[1:])
        window = b""
        while data := self._read(_CHUNK):
            window += data
            at = window.find(_MAGIC, _MAGIC_AT)
            while 0 <= at - _MAGIC_AT <= len(window) - BLOCK:
                if _is_header(window[at - _MAGIC_AT : at - _MAGIC_AT + BLOCK]):
                    self._unread(window[at - _MAGIC_AT :])
                    return True
                at = window.find(_MAGIC, at + 1)
            window = window[1 - BLOCK :]
        return False

    def _unread(self, data: bytes) -> None:
        self.at -= len(data)
        self._blocks.unread(data)


class ArchivePart(Source):
    """A plain archive within an object that can seek: its bodies are skipped without being read.

    start, size  where it lies in the object, in bytes
    """

    def __init__(self, stream: IO[bytes], start: int, size: int) -> None:
        self._position, self._end = start, start + size

        def read(size: int) -> bytes:
            stream.seek(self._position)  # always, because an archive may be read within another one
            data = stream.read(max(0, min(size, _PART_BYTES, self._end - self._position)))
            self._position += len(data)
            return data

        self.at = 0
        self._blocks = self._packed = _Blocks(read)

    def skip_body(self, size: int) -> bytes:
        """As Source says; does not notice that bytes are missing, which the next header then shows."""
        left = size + -size % BLOCK
        begun = self.take(min(left, BLOCK))
        left -= len(begun)
        self._position += left - self._blocks.discard(left)
        self.at += left
        return begun[:size]


def members_of(source: Source) -> Iterator[Member | Gap]:
    """Yield members, and gaps that could not be read; the caller takes or skips each member's body."""
    shared: dict[bytes, bytes] = {}
    while True:
        start = source.at
        try:
            member = _next_member(source, shared)
        except _BadHeader as error:
            more = source.find_header(error.begun)
            where = f"bytes {start:,} to {source.at - 1:,} ({source.at - start:,} bytes)"
            yield Gap(f"is damaged: {where} are not valid tar members and were not read ({error})")
            if not more:
                return
            continue
        yield member
        if member.kind == END:
            shared = {}
            zeros = source.skip_zeros()
            if zeros > _MAX_PADDING_BYTES:
                yield Gap(f"is damaged: {zeros:,} bytes from {start:,} on are zeros, too many for an end of archive")
            if not source.has_more():
                return


def _next_member(source: Source, shared: dict[bytes, bytes]) -> Member:
    """The next header with its extended headers. `shared` holds records from global ones, for all later members."""
    own: dict[bytes, bytes] = {}
    while True:
        block = source.take(BLOCK)
        if block == _ZEROS:
            return Member("", END, 0, END)
        size = _size(block)
        kind = block[156:157]
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > _MAX_HEADER_BYTES:
                raise _BadHeader(f"an extended header of {size:,} bytes")
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
            while source.take(BLOCK)[504]:  # the rest of the sparse map
                pass
        return _member(block, kind, size, shared | own if shared or own else {})


def _member(block: bytes, kind: bytes, size: int, records: dict[bytes, bytes]) -> Member:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    if kind == b"0" and not records:
        return Member(name.decode("utf-8", "surrogateescape"), FILE, size, FILE)
    name = records.get(b"GNU.sparse.name") or records.get(b"path") or name
    if digits := records.get(b"size"):
        if not re.fullmatch(rb"[0-9]{1,18}", digits):
            raise _BadHeader("an invalid size")
        size = int(digits)
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"  # how pre-POSIX tar marked directories
    what = _KINDS.get(kind, _OTHER)
    if what == FILE and any(record.startswith(b"GNU.sparse.") for record in records):
        what = _SPARSE
    size = 0 if kind in _WITHOUT_BODY else size
    label = _KIND_NAMES.get(kind, what if what != _OTHER else f"member of type {kind!r}")
    return Member(name.decode("utf-8", "surrogateescape"), what, size, label)


def _size(block: bytes) -> int:
    """Size field of a header with a valid checksum. Raises _BadHeader."""
    try:
        expected = _number(block[148:156])
        unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if expected != unsigned:
            negative = sum(byte > 127 for byte in block[:148] + block[156:])
            if expected != unsigned - 256 * negative:  # some old writers summed signed bytes
                raise ValueError("a wrong header checksum")
        return _number(block[124:136])
    except ValueError as error:
        raise _BadHeader(str(error), block) from None


def _is_header(block: bytes) -> bool:
    try:
        return _size(block) >= 0 and block[0] != 0
    except _BadHeader:
        return False


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value >= 1 << 60:
            raise ValueError("an impossible size")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    if digits:
        raise ValueError("an invalid number in a header")
    return 0


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Keyword -> value from pax records `length keyword=value newline`."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        prefix = _PAX_LENGTH.match(data, position)
        end = position + int(prefix[1]) if prefix else 0
        if prefix is None or end <= prefix.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise _BadHeader("a damaged extended header")
        keyword, _, value = data[prefix.end() : end - 1].partition(b"=")
        records[keyword] = value
        position = end
    return records
