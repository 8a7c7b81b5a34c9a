"""The bytes of a tar archive, plain or packed by gzip -> its members' headers, one after the other, never seeking.

`tarfile` takes a damaged header for the end of the archive, reads no further than one archive of several that were
joined, and reads extended headers of any size into memory; here nothing of that goes unnoticed. Behind what is damaged,
the next header whose checksum holds is looked for.
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
_MAX_PADDING_BYTES = 1 << 20  # behind an end mark; more zeros are a hole where something was
_MAGIC, _MAGIC_AT = b"ustar", 257

FILE, _SPARSE, FOLDER, LABEL, END, _OTHER = "file", "sparse file", "folder", "volume label", "end mark", "other"
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"S": _SPARSE, b"5": FOLDER, b"D": FOLDER, b"V": LABEL}
_WITHOUT_BODY = b"123456"  # links, devices, folders, fifos: their size field counts no bytes
_KIND_NAMES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "fifo"}
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")


class Damaged(Exception):
    """Nothing after this point of the stream can be read."""


class _BadHeader(Exception):
    """What stands where a header should; begun  its bytes, in which another header may begin"""

    def __init__(self, what: str, begun: bytes = b"") -> None:
        super().__init__(what)
        self.begun = begun


class Gap(NamedTuple):
    """A part of the archive that could not be read, with more behind it or not; what  where, how much, and why."""

    what: str


class Member(NamedTuple):
    """One member of an archive, as its header describes it; or an end mark, which another archive may follow."""

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

    def unread(self, data: bytes) -> None:
        """Let `data` be what is read next."""
        self._block, self._at = data + self._block[self._at :], 0

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
    """The bytes of the archive, unpacked if need be: as many as asked for, or Damaged. `at` counts those taken."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.at = 0
        self._blocks = self._packed = _Blocks(stream.read)
        if self._blocks.starts_with(b"\x1f\x8b"):
            packed = cast(IO[bytes], self._packed)
            # read1: what was unpacked before the damage must arrive before the error
            self._blocks = _Blocks(gzip.GzipFile(fileobj=packed, mode="rb").read1)

    def _read(self, size: int) -> bytes:
        try:
            data = self._blocks.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            left = sum(map(len, iter(lambda: self._packed.read(_READ_BYTES), b"")))
            at = f"near byte {self.at:,} of what it holds"
            raise Damaged(f"is damaged or cut {at}: {error}; {left:,} more packed bytes were not read") from None
        self.at += len(data)
        return data

    def take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise Damaged(f"ends at byte {self.at:,}, where {size - len(data):,} more bytes should follow")
        return data

    def skip_body(self, size: int) -> bytes:
        """Pass over a member's body and its padding; how it begins, up to 512 bytes."""
        left = size + -size % BLOCK
        begun = self.take(min(left, BLOCK))
        left -= len(begun)
        while left:
            left -= len(self.take(min(left, _CHUNK)))
        return begun[:size]

    def skip_zeros(self) -> int:
        """Pass over whole blocks of zeros, and over zeros at the end; how many bytes that were."""
        start = self.at
        while data := self._read(_CHUNK):
            if data.count(0) != len(data):
                zeros = len(data) - len(data.lstrip(b"\0"))
                self._unread(data[zeros - zeros % BLOCK :])
                break
        return self.at - start

    def has_more(self) -> bool:
        """True unless all is read."""
        data = self._read(1)
        self._unread(data)
        return bool(data)

    def find_header(self, begun: bytes) -> bool:
        """Go to the next header, of any place, whose checksum holds; False if there is none, and all is read.

        begun  what was taken last and is looked through again, but for its first byte
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


def members_of(source: Source) -> Iterator[Member | Gap]:
    """Yield header after header, and what lies between them unread; the caller takes or skips each body."""
    shared: dict[bytes, bytes] = {}
    while True:
        start = source.at
        try:
            member = _next_member(source, shared)
        except _BadHeader as error:
            more = source.find_header(error.begun)
            where = f"bytes {start:,} to {source.at - 1:,} ({source.at - start:,} bytes)"
            yield Gap(f"is damaged: {where} are no members of a tar archive and were not read ({error})")
            if not more:
                return
            continue
        yield member
        if member.kind == END:
            shared = {}
            zeros = source.skip_zeros()
            if zeros > _MAX_PADDING_BYTES:
                yield Gap(f"is damaged: {zeros:,} bytes from {start:,} on are zeros, more than an archive ends with")
            if not source.has_more():
                return


def _next_member(source: Source, shared: dict[bytes, bytes]) -> Member:
    """The next header, with those that extend it. `shared` holds what global ones say of all members behind them."""
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
            while source.take(BLOCK)[504]:  # the rest of a sparse file's map
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
            raise _BadHeader("a size that is not a number")
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
    """Size field of a header whose checksum holds. Raises _BadHeader."""
    try:
        expected = _number(block[148:156])
        unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if expected != unsigned:
            negative = sum(byte > 127 for byte in block[:148] + block[156:])
            if expected != unsigned - 256 * negative:  # some old writers summed signed bytes
                raise ValueError("a header's checksum is wrong")
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
            raise ValueError("a size that cannot be")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    if digits:
        raise ValueError("a header's number is none")
    return 0


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Keyword -> value of pax records `length keyword=value newline`."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        found = _PAX_LENGTH.match(data, position)
        end = position + int(found[1]) if found else 0
        if found is None or end <= found.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise _BadHeader("a damaged extended header")
        keyword, _, value = data[found.end() : end - 1].partition(b"=")
        records[keyword] = value
        position = end
    return records
