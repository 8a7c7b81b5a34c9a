"""Tar streams <-> samples: strict rules for members, fixed metadata for what is written.

The reader trusts nothing: it never seeks, holds one sample at a time, follows no link, and a member that breaks
a rule costs its sample, not the shard.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from pipeline.errors import Reason
from pipeline.records import Rejection, Sample, shown
from pipeline.shards.archive import BLOCK, END, FILE, FOLDER, LABEL, Damaged, Gap, Member, Source, members_of
from pipeline.storage.streams import HashedFile

_ZEROS = bytes(BLOCK)
_MAX_NAME_BYTES = 4096
_MAX_MEMBERS = 1000  # of one sample
_MAX_SAMPLE = 4  # bytes of one sample, as a multiple of max_member_bytes
_WRITE_BYTES = 1 << 18
_JOINED_BYTES = 1 << 15  # to copy less than this costs less than to handle its pieces one by one
_WRITE_PARTS = 900  # of one call; 1024 is what Linux allows
_GZIP_LEVEL = 1  # images do not shrink; higher levels cost more time than their encoding

_NOTES = (b"\x00\x05\x16\x07", b"\x00\x00\x00\x01Bud1")  # AppleDouble; .DS_Store
_ORDINARY = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_./-]*")  # breaks no rule that looks at single characters
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def read_samples(stream: IO[bytes], *, max_member_bytes: int) -> Iterator[Sample | Rejection]:
    """Yield the samples of a tar or tar.gz stream in input order; what breaks a rule is a Rejection instead.

    stream            binary, read forwards only; it is not closed
    max_member_bytes  a larger member is skipped unread, and its sample rejected

    A sample is a run of adjacent members with one key: the path up to the first dot of the base name; the rest
    after that dot is the suffix. There is one Rejection per sample, for the first rule that one of its members
    breaks, and one per member that has no key. Folders, volume labels and what a Mac notes beside a file are skipped.
    A key that comes back after another is rejected; its first run has been yielded by then. Archives that were joined
    are read one after the other. Damaged or missing bytes never raise: each such place is one Rejection
    TRUNCATED_SHARD, which says where and how much was not read; every sample before and behind it is yielded, but for
    those next to it, which may lack members. Errors of `stream` itself (a store that fails) pass through.
    """
    group: _Group | None = None
    seen: set[bytes] = set()
    name, after_gap = "", False
    try:
        source = Source(stream)
        for member in members_of(source):
            if isinstance(member, Gap):
                yield from _torn(group, name, member.what)
                group, after_gap = None, True
                continue
            if member.kind == END:
                if group is not None:
                    yield group.result()
                group, after_gap = None, False
                continue
            name = member.name
            if member.kind == FOLDER or (member.kind == LABEL and not member.size):
                source.skip_body(member.size)
                continue
            key, suffix = split_name(name)
            fault = _fault(member, key, suffix, max_member_bytes)
            if fault is not None and not _has_key(key, suffix):
                begun = source.skip_body(member.size)
                if not _is_note(name, begun):
                    yield Rejection(shown(name), shown(name), *fault)
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group.result()
                    after_gap = False
                group = _Group(key, max_member_bytes, known=_remember(key, seen), torn=after_gap)
            if group.accepts(name, suffix, member.size, fault):
                group.members[suffix] = source.take(member.size)
                source.take(-member.size % BLOCK)
            else:
                source.skip_body(member.size)
    except Damaged as error:
        yield from _torn(group, name, str(error))


def _torn(group: _Group | None, name: str, what: str) -> Iterator[Rejection]:
    """The line for a damaged place; the sample that it cuts is lost with it, unless it was rejected before."""
    key = member = ""
    if group is not None and group.rejection is not None:
        yield group.rejection
    elif group is not None:
        key, member = shown(group.key), shown(name)
    yield Rejection(key, member, Reason.TRUNCATED_SHARD, f"the shard {what}")


def _is_note(name: str, begun: bytes) -> bool:
    """True for what a Mac writes beside files (`._a.jpg`, `.DS_Store`), known by its first bytes too."""
    return name.rpartition("/")[2].startswith(".") and begun.startswith(_NOTES)


def is_packed(shard: str) -> bool:
    """True if a shard of this name is written through gzip."""
    return shard.lower().endswith((".gz", ".tgz"))


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member name: cut at the first dot of its base name; the suffix may be empty."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


class _Group:
    """The sample that is being read."""

    def __init__(self, key: str, max_member_bytes: int, *, known: bool, torn: bool) -> None:
        self.key = key
        self.members: dict[str, bytes] = {}
        self.rejection: Rejection | None = None
        self._known, self._torn = known, torn
        self._suffixes: set[str] = set()
        self._left = _MAX_SAMPLE * max_member_bytes

    def accepts(self, name: str, suffix: str, size: int, fault: tuple[Reason, str] | None) -> bool:
        """True if the member may be read; otherwise the sample is rejected, and what was read of it let go."""
        if self.rejection is not None:
            return False
        self._left -= size
        if self._torn:
            fault = Reason.TRUNCATED_SHARD, "it follows a damaged part of the shard, so that it may lack members"
        elif self._known:
            fault = Reason.INTERLEAVED_KEY, "this key was in the shard before, with another key between"
        elif fault is None and suffix.casefold() in self._suffixes:
            fault = Reason.DUPLICATE_MEMBER, "two members of the sample have this name (case aside)"
        elif fault is None and (self._left < 0 or len(self._suffixes) >= _MAX_MEMBERS):
            fault = Reason.TOO_LARGE, "the sample has too many or too large members together"
        if fault is not None:
            self.rejection = Rejection(shown(self.key), shown(name), *fault)
            self.members = {}
        self._suffixes.add(suffix.casefold())  # readers compare suffixes without case
        return fault is None

    def result(self) -> Sample | Rejection:
        return self.rejection or Sample(self.key, self.members)


def _has_key(key: str, suffix: str) -> bool:
    return bool(suffix) and bool(key) and not key.endswith("/")


def _fault(member: Member, key: str, suffix: str, max_member_bytes: int) -> tuple[Reason, str] | None:
    name = member.name
    plain = _ORDINARY.fullmatch(name) is not None and ".." not in name and len(name) <= _MAX_NAME_BYTES
    plain = plain and _has_key(key, suffix) and not suffix.startswith("__")
    if plain and member.kind == FILE and member.size <= max_member_bytes:
        return None  # nearly always; the rest says what is wrong
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return Reason.UNSAFE_NAME, "the name is absolute"
    if ".." in name.split("/"):
        return Reason.UNSAFE_NAME, "the name leaves its folder"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name holds a backslash or a control character"
    if member.kind != FILE:
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
        self._file = HashedFile(path)
        self._gzip = gzip.GzipFile("", "wb", _GZIP_LEVEL, cast(IO[bytes], self._file), mtime=0) if compressed else None
        self._parts: list[bytes] = []  # not written yet: one call for many costs less than one for each
        self._waiting = 0
        self._archived = 0

    def write(self, sample: Sample) -> None:
        """Append the sample's members, in their order."""
        pieces: list[bytes] = []
        for suffix, data in sample.members.items():
            pieces += header(f"{sample.key}.{suffix}", len(data)), data, _ZEROS[: -len(data) % BLOCK]
        self.num_members += len(sample.members)
        joined = [b"".join(pieces)] if sum(map(len, pieces)) <= _JOINED_BYTES else pieces
        for piece in joined:
            self._add(piece)
        if self._waiting >= _WRITE_BYTES or len(self._parts) >= _WRITE_PARTS:
            self._flush()

    def close(self) -> None:
        """Finish the archive; size and digest are known then."""
        if self.sha256:
            return
        self._add(bytes(2 * BLOCK))
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
