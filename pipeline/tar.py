"""Tar streams <-> samples: strict rules for members, fixed metadata for what is written.

The reader trusts nothing: it never seeks, holds one sample at a time, follows no link, and a member that breaks
a rule costs its sample, not the shard. It reads the headers itself, because `tarfile` takes a damaged header for
the end of the archive and reads extended headers of any size into memory.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

from pipeline.records import Reason, Rejection, Sample

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_CHUNK = 1 << 16
_READ_BYTES = 4 * _CHUNK
_MAX_READ_BYTES = 256 * _CHUNK  # at once: what a header claims is not believed before it has arrived
_MAX_HEADER_BYTES = 1 << 20  # of one extended header: a long name or pax records
_MAX_NAME_BYTES = 4096
_MAX_MEMBERS = 1000  # of one sample
_MAX_SAMPLE = 4  # bytes of one sample, as a multiple of max_member_bytes
_MAX_PADDING_BYTES = 16 << 20  # looked through behind the end of the archive
_WRITE_BYTES = 1 << 18
_WRITE_PARTS = 900  # of one call; 1024 is what Linux allows
_GZIP_LEVEL = 1  # images do not shrink; higher levels cost more time than their encoding

_FILE, _SPARSE, _FOLDER, _OTHER = "file", "sparse file", "folder", "other"
_KINDS = {b"0": _FILE, b"\0": _FILE, b"7": _FILE, b"S": _SPARSE, b"5": _FOLDER, b"D": _FOLDER}
_WITHOUT_BODY = b"123456"  # links, devices, folders, fifos: their size field counts no bytes
_KIND_NAMES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "fifo"}
_ORDINARY = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_./-]*")  # breaks no rule that looks at single characters
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_OCTAL = re.compile(rb"[0-7]*")
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")


class _Damaged(Exception):
    """Nothing after this point of the stream can be trusted."""


class _Member(NamedTuple):
    name: str  # bytes that are not UTF-8 are lone surrogates
    kind: str
    size: int  # bytes of its body
    what: str  # the kind, for people


def read_samples(stream: IO[bytes], *, max_member_bytes: int) -> Iterator[Sample | Rejection]:
    """Yield the samples of a tar or tar.gz stream in input order; what breaks a rule is a Rejection instead.

    stream            binary, read forwards only; it is not closed
    max_member_bytes  a larger member is skipped unread, and its sample rejected

    A sample is a run of adjacent members with one key: the path up to the first dot of the base name; the rest
    after that dot is the suffix. There is one Rejection per sample, for the first rule that one of its members
    breaks, and one per member that has no key. Folders are skipped. A key that comes back after another is
    rejected; its first run has been yielded by then. Damaged or missing bytes never raise: every sample before
    them is yielded, the one that they cut is not, and the last Rejection is TRUNCATED_SHARD. Errors of `stream`
    itself (a store that fails) pass through.
    """
    group: _Group | None = None
    seen: set[bytes] = set()
    name = ""
    try:
        source = _Source(stream)
        for member in _members(source):
            name = member.name
            if member.kind == _FOLDER:
                source.skip_body(member.size)
                continue
            key, suffix = split_name(name)
            fault = _fault(member, key, suffix, max_member_bytes)
            if fault is not None and not _has_key(key, suffix):
                yield Rejection(_shown(name), _shown(name), *fault)
                source.skip_body(member.size)
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group.result()
                group = _Group(key, max_member_bytes, known=_remember(key, seen))
            if group.accepts(name, suffix, member.size, fault):
                group.members[suffix] = source.take(member.size)
                source.take(-member.size % _BLOCK)
            else:
                source.skip_body(member.size)
    except _Damaged as error:
        if group is not None and group.rejection is not None:
            yield group.rejection
            group = None
        key = "" if group is None else group.key
        yield Rejection(_shown(key), _shown(name) if group else "", Reason.TRUNCATED_SHARD, f"the shard {error}")
        return
    if group is not None:
        yield group.result()


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member name: cut at the first dot of its base name; the suffix may be empty."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


class _Group:
    """The sample that is being read."""

    def __init__(self, key: str, max_member_bytes: int, *, known: bool) -> None:
        self.key = key
        self.members: dict[str, bytes] = {}
        self.rejection: Rejection | None = None
        self._known = known
        self._suffixes: set[str] = set()
        self._left = _MAX_SAMPLE * max_member_bytes

    def accepts(self, name: str, suffix: str, size: int, fault: tuple[Reason, str] | None) -> bool:
        """True if the member may be read; otherwise the sample is rejected, and what was read of it let go."""
        if self.rejection is not None:
            return False
        self._left -= size
        if self._known:
            fault = Reason.INTERLEAVED_KEY, "this key was in the shard before, with another key between"
        elif fault is None and suffix.casefold() in self._suffixes:
            fault = Reason.DUPLICATE_MEMBER, "two members of the sample have this name (case aside)"
        elif fault is None and (self._left < 0 or len(self._suffixes) >= _MAX_MEMBERS):
            fault = Reason.TOO_LARGE, "the sample has too many or too large members together"
        if fault is not None:
            self.rejection = Rejection(_shown(self.key), _shown(name), *fault)
            self.members = {}
        self._suffixes.add(suffix.casefold())  # readers compare suffixes without case
        return fault is None

    def result(self) -> Sample | Rejection:
        return self.rejection or Sample(self.key, self.members)


def _has_key(key: str, suffix: str) -> bool:
    return bool(suffix) and bool(key) and not key.endswith("/")


def _fault(member: _Member, key: str, suffix: str, max_member_bytes: int) -> tuple[Reason, str] | None:
    name = member.name
    if _ORDINARY.fullmatch(name) and ".." not in name and member.kind == _FILE and member.size <= max_member_bytes:
        if _has_key(key, suffix) and not suffix.startswith("__") and len(name) <= _MAX_NAME_BYTES:
            return None
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return Reason.UNSAFE_NAME, "the name is absolute"
    if ".." in name.split("/"):
        return Reason.UNSAFE_NAME, "the name leaves its folder"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name holds a backslash or a control character"
    if member.kind != _FILE:
        return Reason.NOT_A_FILE, f"the member is a {member.what}"
    if not _has_key(key, suffix):
        return Reason.UNUSABLE_NAME, "the name has no extension, or nothing before it"
    if suffix.startswith("__"):
        return Reason.UNUSABLE_NAME, "suffixes that begin with __ belong to the readers of shards"
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES:
        return Reason.UNUSABLE_NAME, f"the name is longer than {_MAX_NAME_BYTES} bytes"
    if re.search("[\ud800-\udfff]", name):
        return Reason.UNUSABLE_NAME, "the name is not UTF-8"
    if member.size > max_member_bytes:
        return Reason.TOO_LARGE, f"{member.size:,} bytes are more than --max-member-bytes {max_member_bytes:,}"
    return None


def _remember(key: str, seen: set[bytes]) -> bool:
    """True if `key` was here before; 8 bytes of hash are kept for each, whatever its length."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    known = digest in seen
    seen.add(digest)
    return known


def _shown(name: str) -> str:
    """`name` as it can stand in a log and in JSON; unchanged if there is nothing wrong with it."""
    text = name[:_MAX_NAME_BYTES].encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


class _Blocks:
    """A stream of which only `read` is known, so that nothing can seek or close it, read in large blocks."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._more = read
        self._block = b""
        self._at = 0

    def starts_with(self, mark: bytes) -> bool:
        self._block = self._more(_READ_BYTES)
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


class _Source:
    """The bytes of the archive, unpacked if need be: as many as asked for, or _Damaged."""

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
            raise _Damaged(f"is damaged or cut: {error}") from None

    def take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) != size:
            raise _Damaged(f"ends where {size - len(data):,} more bytes should follow")
        return data

    def skip_body(self, size: int) -> None:
        """Pass over a member's body and its padding."""
        left = size + -size % _BLOCK
        while left:
            left -= len(self.take(min(left, _CHUNK)))

    def finish(self) -> None:
        """Look behind the end of the archive: only padding may follow, and gzip's checksum has to hold."""
        for _ in range(_MAX_PADDING_BYTES // _CHUNK):
            data = self._read(_CHUNK)
            if data.count(0) != len(data):
                raise _Damaged("goes on behind the end of its archive (two archives joined into one file?)")
            if len(data) < _CHUNK:
                return


def _members(source: _Source) -> Iterator[_Member]:
    """Yield header after header; the caller takes or skips the body in between."""
    shared: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    while True:
        block = source.take(_BLOCK)
        if block == _ZEROS:
            source.finish()
            return
        size = _size(block)
        kind = block[156:157]
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > _MAX_HEADER_BYTES:
                raise _Damaged(f"has an extended header of {size:,} bytes")
            data = source.take(size)
            source.take(-size % _BLOCK)
            if kind == b"g":
                shared |= _pax_records(data)
            elif kind == b"L":
                own.setdefault(b"path", data.rstrip(b"\0"))
            elif kind != b"K":
                own |= _pax_records(data)
            continue
        if kind == b"S" and block[482]:
            while source.take(_BLOCK)[504]:  # the rest of a sparse file's map
                pass
        records = shared | own if shared or own else {}
        yield _member(block, kind, size, records)
        own = {}


def _member(block: bytes, kind: bytes, size: int, records: dict[bytes, bytes]) -> _Member:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    if kind == b"0" and not records:
        return _Member(name.decode("utf-8", "surrogateescape"), _FILE, size, _FILE)
    name = records.get(b"GNU.sparse.name") or records.get(b"path") or name
    if digits := records.get(b"size"):
        if not re.fullmatch(rb"[0-9]{1,18}", digits):
            raise _Damaged("has a size that is not a number")
        size = int(digits)
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"  # how tar marked folders before 1988
    what = _KINDS.get(kind, _OTHER)
    if what == _FILE and any(record.startswith(b"GNU.sparse.") for record in records):
        what = _SPARSE
    size = 0 if kind in _WITHOUT_BODY else size
    label = _KIND_NAMES.get(kind, what if what != _OTHER else f"member of type {kind!r}")
    return _Member(name.decode("utf-8", "surrogateescape"), what, size, label)


def _size(block: bytes) -> int:
    """Size field of a header whose checksum holds."""
    expected = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if expected != unsigned:
        negative = sum(byte > 127 for byte in block[:148] + block[156:])
        if expected != unsigned - 256 * negative:  # some old writers summed signed bytes
            raise _Damaged("is no tar archive or damaged: a header's checksum is wrong")
    return _number(block[124:136])


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value >= 1 << 60:
            raise _Damaged("has a header with a size that cannot be")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if not _OCTAL.fullmatch(digits):
        raise _Damaged("is no tar archive or damaged: a header's number is none")
    return int(digits or b"0", 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Keyword -> value of pax records `length keyword=value newline`."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        found = _PAX_LENGTH.match(data, position)
        end = position + int(found[1]) if found else 0
        if found is None or end <= found.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise _Damaged("has a damaged extended header")
        keyword, _, value = data[found.end() : end - 1].partition(b"=")
        records[keyword] = value
        position = end
    return records


class ShardWriter:
    """Writes samples to a local file as a tar whose bytes depend on the samples alone.

    Members keep their order; mtime, owner and mode are fixed, the format is GNU: byte for byte what webdataset's
    TarWriter makes of the same members (which it would sort). `sha256`, `size` and `num_members` are true after
    `close()`; a `with` block that fails leaves an unfinished file without a digest.
    """

    def __init__(self, path: Path, *, compressed: bool) -> None:
        self.num_members = 0
        self.sha256 = ""
        self.size = 0
        self._file = _Hashed(path)
        self._gzip = gzip.GzipFile("", "wb", _GZIP_LEVEL, cast(IO[bytes], self._file), mtime=0) if compressed else None
        self._parts: list[bytes] = []  # not written yet: one call for many costs less than one for each
        self._waiting = 0
        self._archived = 0

    def write(self, sample: Sample) -> None:
        """Append the sample's members, in their order."""
        for suffix, data in sample.members.items():
            self._add(header(f"{sample.key}.{suffix}", len(data)))
            self._add(data)
            self._add(_ZEROS[: -len(data) % _BLOCK])
            self.num_members += 1
        if self._waiting >= _WRITE_BYTES or len(self._parts) >= _WRITE_PARTS:
            self._flush()

    def close(self) -> None:
        """Finish the archive; size and digest are known then."""
        if self.sha256:
            return
        self._add(bytes(2 * _BLOCK))
        self._add(bytes(-self._archived % tarfile.RECORDSIZE))
        self._flush()
        if self._gzip is not None:
            self._gzip.close()
        self._file.close()
        self.size = self._file.size
        self.sha256 = self._file.digest.hexdigest()

    def _add(self, data: bytes) -> None:
        self._archived += len(data)
        if self._gzip is not None:
            self._gzip.write(data)
            return
        self._file.take_note(data)
        self._parts.append(data)
        self._waiting += len(data)

    def _flush(self) -> None:
        self._file.write_noted(self._parts)
        self._parts = []
        self._waiting = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()


def header(name: str, size: int) -> bytes:
    """GNU header of a file of `size` bytes: mode 0644, owner 0, mtime 0.

    The ordinary case is put together here in a tenth of the time that tarfile takes for it.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or size >= 1 << 33:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    digits = b"%011o" % size
    checksum = _FIXED_SUM + sum(encoded) + sum(digits)
    return b"%b%b%b%b%06o%b" % (encoded.ljust(100, b"\0"), _FIXED[0], digits, _FIXED[1], checksum, _FIXED[2])


def _fixed() -> tuple[tuple[bytes, bytes, bytes], int]:
    """What all ordinary headers share: between name and size, between size and checksum, behind; and its sum."""
    empty = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
    between = empty[100:124], empty[135:148], empty[154:]
    places = 8 * ord(" ") - sum(empty[154:156])  # a checksum counts its own eight places as spaces
    return between, sum(map(sum, between)) + places


_FIXED, _FIXED_SUM = _fixed()


class _Hashed(io.RawIOBase):
    """A new file that knows its size and SHA-256 while it is written."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._file = path.open("wb", buffering=8 * _CHUNK)

    def writable(self) -> bool:
        return True

    def take_note(self, data: bytes) -> None:
        """Hash what will be written later, now that it still is in the processor's cache."""
        self.digest.update(data)
        self.size += len(data)

    def write_noted(self, parts: list[bytes]) -> None:
        """Write what was noted, in the same order, without joining it."""
        for start in range(0, len(parts), _WRITE_PARTS):
            some = parts[start : start + _WRITE_PARTS]
            written = os.writev(self._file.fileno(), some)
            if written != sum(map(len, some)):
                self._file.write(b"".join(some)[written:])
                self._file.flush()

    def write(self, data: Any) -> int:
        self.take_note(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()
