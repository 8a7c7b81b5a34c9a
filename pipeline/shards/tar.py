"""Tar streams <-> samples, with strict rules for members and fixed metadata when writing.

The reader trusts nothing: it never seeks, holds one sample at a time and follows no links. A member that breaks a rule
costs its sample, not the shard.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar, cast

from pipeline.errors import Reason
from pipeline.records import Rejection, Sample, shown
from pipeline.shards.archive import BLOCK, END, FILE, FOLDER, LABEL, Damaged, Gap, Member, Source, members_of
from pipeline.storage.streams import HashedFile

_W = TypeVar("_W", bound="ShardWriter")

_ZEROS = bytes(BLOCK)
ANY_BYTES = 1 << 40  # no limit on members, for what we have written ourselves: without loss, files become much larger
_MAX_NAME_BYTES = 4096
_MAX_MEMBERS = 1000  # per sample
_MAX_SAMPLE = 4  # limit on a sample's bytes, as a multiple of max_member_bytes
_WRITE_BYTES = 1 << 18
_JOINED_BYTES = 1 << 15  # below this, copying is cheaper than handling pieces separately
_WRITE_PARTS = 900  # per call; Linux allows 1024
_GZIP_LEVEL = 1  # images hardly compress; higher levels would take longer than encoding

_NOTES = (b"\x00\x05\x16\x07", b"\x00\x00\x00\x01Bud1")  # AppleDouble; .DS_Store
_ORDINARY = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_./-]*")  # satisfies every rule about single characters
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def read_samples(stream: IO[bytes], *, max_member_bytes: int) -> Iterator[Sample | Rejection]:
    """Yield the samples of a tar or tar.gz stream in input order, or a Rejection for what breaks a rule.

    stream            binary, read forwards only, not closed
    max_member_bytes  larger members are skipped unread, and their samples rejected

    A sample is a run of adjacent members with the same key: the path up to the first dot of the base name; the part
    after that dot is the suffix. There is one Rejection per sample, for the first rule that any of its members breaks,
    and one per member without a key. Folders, volume labels and macOS metadata files are skipped. A key that returns
    after another one is rejected; its first run has been yielded by then. Concatenated archives are read one after the
    other. Damaged or missing bytes never raise: each such place yields one TRUNCATED_SHARD Rejection that says where
    and how much was not read; all samples before and after it are yielded, except those next to it, which may lack
    members. Errors from `stream` itself (a failing store) propagate.
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
    """The rejection for a damaged place, which includes the interrupted sample unless that was already rejected."""
    key = member = ""
    if group is not None and group.rejection is not None:
        yield group.rejection
    elif group is not None:
        key, member = shown(group.key), shown(name)
    yield Rejection(key, member, Reason.TRUNCATED_SHARD, f"the shard {what}")


def _is_note(name: str, begun: bytes) -> bool:
    """True for macOS metadata files (`._a.jpg`, `.DS_Store`), confirmed by their first bytes."""
    return name.rpartition("/")[2].startswith(".") and begun.startswith(_NOTES)


def is_packed(shard: str) -> bool:
    """True if a shard with this name is gzipped."""
    return shard.lower().endswith((".gz", ".tgz"))


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member name, split at the first dot of its base name; the suffix may be empty."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


class _Group:
    """The sample being read."""

    def __init__(self, key: str, max_member_bytes: int, *, known: bool, torn: bool) -> None:
        self.key = key
        self.members: dict[str, bytes] = {}
        self.rejection: Rejection | None = None
        self._known, self._torn = known, torn
        self._suffixes: set[str] = set()
        self._left = _MAX_SAMPLE * max_member_bytes

    def accepts(self, name: str, suffix: str, size: int, fault: tuple[Reason, str] | None) -> bool:
        """True if the member may be read; otherwise rejects the sample and discards what was read of it."""
        if self.rejection is not None:
            return False
        self._left -= size
        if self._torn:
            fault = Reason.TRUNCATED_SHARD, "it follows a damaged part of the shard and may lack members"
        elif self._known:
            fault = Reason.INTERLEAVED_KEY, "this key already occurred in the shard, before another key"
        elif fault is None and suffix.casefold() in self._suffixes:
            fault = Reason.DUPLICATE_MEMBER, "two members of the sample have this name (ignoring case)"
        elif fault is None and (self._left < 0 or len(self._suffixes) >= _MAX_MEMBERS):
            fault = Reason.TOO_LARGE, "the sample's members are too many or too large in total"
        if fault is not None:
            self.rejection = Rejection(shown(self.key), shown(name), *fault)
            self.members = {}
        self._suffixes.add(suffix.casefold())  # readers compare suffixes case-insensitively
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
        return None  # the usual case; the rest says what is wrong
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return Reason.UNSAFE_NAME, "the name is absolute"
    if ".." in name.split("/"):
        return Reason.UNSAFE_NAME, "the name leaves its folder"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name contains a backslash or a control character"
    if member.kind != FILE:
        return Reason.NOT_A_FILE, f"the member is a {member.what}"
    if not _has_key(key, suffix):
        return Reason.UNUSABLE_NAME, "the name has no extension, or nothing before the extension"
    if suffix.startswith("__"):
        return Reason.UNUSABLE_NAME, "suffixes that begin with __ are reserved by shard readers"
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES:
        return Reason.UNUSABLE_NAME, f"the name is longer than {_MAX_NAME_BYTES} bytes"
    if re.search("[\ud800-\udfff]", name):
        return Reason.UNUSABLE_NAME, "the name is not UTF-8"
    if member.size > max_member_bytes:
        return Reason.TOO_LARGE, f"{member.size:,} bytes exceed --max-member-bytes {max_member_bytes:,}"
    return None


def _remember(key: str, seen: set[bytes]) -> bool:
    """True if `key` was seen before; keeps an 8-byte hash per key, whatever its length."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    known = digest in seen
    seen.add(digest)
    return known


class ShardWriter:
    """Writes samples to a local file as a tar whose bytes depend only on the samples.

    Members keep their order; mtime, owner and mode are fixed, the format is GNU: byte for byte what webdataset's
    TarWriter makes of the same members (which it would sort). `sha256`, `size` and `num_members` are valid after
    `close()`; a failed `with` block leaves an unfinished file without a digest.
    """

    def __init__(self, path: Path, *, compressed: bool) -> None:
        self.num_members = 0
        self.sha256 = ""
        self.size = 0
        self._file = HashedFile(path)
        self._gzip = gzip.GzipFile("", "wb", _GZIP_LEVEL, cast(IO[bytes], self._file), mtime=0) if compressed else None
        self._parts: list[bytes] = []  # not written yet: one call for many is cheaper than one each
        self._waiting = 0
        self._archived = 0

    def write(self, sample: Sample) -> None:
        """Append the sample's members, in order."""
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
        """Finish the archive and set size and digest."""
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

    def __enter__(self: _W) -> _W:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()


def header(name: str, size: int) -> bytes:
    """GNU header for a file of `size` bytes: mode 0644, owner 0, mtime 0.

    The usual case is assembled here in a tenth of the time tarfile takes.
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
    """What all usual headers share: between name and size, between size and checksum, and after it; and their sum."""
    empty = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
    between = empty[100:124], empty[135:148], empty[154:]
    places = 8 * ord(" ") - sum(empty[154:156])  # the checksum field itself counts as eight spaces
    return between, sum(map(sum, between)) + places


_FIXED, _FIXED_SUM = _fixed()
