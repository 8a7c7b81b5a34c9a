"""Mutated tars and images for tests: made again from their names, mutated further where the outcome was new."""

from __future__ import annotations

import gzip
import pickle
import random
import tarfile
import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.samples import image_bytes, noise, tar_bytes

OUTSIDE = "/tmp/scumble-fuzz-outside"  # where absolute names and links point; nothing may appear there
MARKER = "unpickled"  # what unpickling would create in the working folder
ZEROS_PACKED = gzip.compress(bytes(1 << 22), mtime=0)

Members = list[tuple[tarfile.TarInfo, bytes]]


@dataclass(frozen=True)
class Case:
    """An input by name: what it began as, and the seeds of the mutations upon that, one after the other."""

    base: str
    seeds: tuple[int, ...] = ()

    def rngs(self) -> Iterator[random.Random]:
        return map(random.Random, self.seeds)


class Corpus:
    """Inputs worth mutating: the bases, and whatever led to an outcome that was not seen before."""

    def __init__(self, bases: Sequence[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.cases = [Case(base) for base in bases]
        self.seen: set[Hashable] = set()

    def draw(self) -> Case:
        parent = self.rng.choice(self.cases)
        return Case(
            parent.base, (*parent.seeds, *(self.rng.getrandbits(32) for _ in range(self.rng.choice((1, 1, 2)))))
        )

    def learn(self, case: Case, outcome: Hashable) -> None:
        if outcome not in self.seen and len(case.seeds) < 8:
            self.cases.append(case)
        self.seen.add(outcome)


class Bomb:
    """Unpickling one leaves a file in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARKER, "w")


# --- mutations -----------------------------------------------------------------------------------------------------

NUMBERS = [n.to_bytes(w, order) for w in (1, 2, 4) for n in (0, 1, 127, 255) for order in ("big", "little")]
NUMBERS += [b"\xff\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff", b"\x80\x00\x00\x00"]


def bent(data: bytes, rng: random.Random, others: Sequence[bytes], unit: int = 1) -> bytes:
    """One small change somewhere, more often near the beginning; `unit` is what is cut, copied or left out."""
    if not data:
        return bytes(rng.randrange(3))
    size = len(data) if rng.random() < 0.6 else min(len(data), 300)
    at = rng.randrange(size)
    match rng.randrange(8):
        case 0 | 1:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 4, 20))):
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 2:
            number = rng.choice(NUMBERS)
            return data[:at] + number + data[at + len(number) :]
        case 3:
            return data[: at // unit * unit + rng.choice((-1, 0, 0, 1))]
    at, length = at // unit * unit, unit * rng.choice((1, 1, 2, 7, 64))
    match rng.randrange(4):
        case 0:
            return data[:at] + data[at + length :]
        case 1:
            start = rng.randrange(len(data)) // unit * unit
            return data[:at] + data[start : start + length] + data[at + rng.choice((0, length)) :]
        case 2:
            return data[:at] + bytes(length) + data[at + rng.choice((0, length)) :]
    other = rng.choice(others)
    start = rng.randrange(len(other)) // unit * unit
    return data[:at] + other[start : start + rng.choice((length, len(other)))] + data[at + rng.choice((0, length)) :]


def bent_image(data: bytes, rng: random.Random) -> bytes:
    """A mutated image; most often its checksums and sizes hold again, so that the change reaches the decoder."""
    data = bent(data, rng, small_images())
    if rng.random() < 0.7 and data.startswith(b"\x89PNG\r\n\x1a\n"):
        return repaired_png(data)
    if rng.random() < 0.7 and data.startswith(b"RIFF"):
        return data[:4] + (max(0, len(data) - 8)).to_bytes(4, "little") + data[8:]
    return data


def repaired_png(data: bytes) -> bytes:
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        parts.append(data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"))
        at = end + 4
    return b"".join([*parts, data[at:]])


HEADER_FIELDS = {
    (0, 100): [b"", b"/" + b"x" * 99, b"../x.png", b"a.png", b"\xff.jpg", b"x\0y.png", OUTSIDE.encode() + b"/a.png"],
    (124, 12): [b"77777777777\0", b"\x80" + bytes(5) + b"\1" + bytes(5), b"\x80" + b"\x0f" * 11, b"\xff" * 12]
    + [b" " * 12, b"00000000008\0", b"-0000000001\0", b"00000001000\0", b"00000000001 ", bytes(12)],
    (148, 8): [b"0000000\0", b"\xff" * 8, bytes(8), b"        "],
    (156, 1): [bytes([one]) for one in b"0123456789ALKxgSDXVMNZ\0"],
    (257, 8): [b"ustar  \0", b"ustar\x0000", bytes(8)],
    (345, 155): [b"../" * 40, b"/etc", b"p" * 155, b"", b"\xff" * 20],
    (482, 1): [b"\1"],
}


def bent_header(data: bytes, rng: random.Random) -> bytes:
    """One field of one header overwritten; most often the checksum is made to hold."""
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not heads:
        return data
    at = rng.choice(heads)
    (start, size), values = rng.choice(list(HEADER_FIELDS.items()))
    block = bytearray(data[at : at + 512])
    block[start : start + size] = rng.choice(values)[:size].ljust(size, b"\0")
    if rng.random() < 0.75 and start != 148:
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return data[:at] + bytes(block) + data[at + 512 :]


NAMES = [f"{OUTSIDE}/a.png", "../a.png", "a/../../b.jpg", "C:/a.png", "a\\b.png", "a\nb.png", "a", ".hidden", "a.", "/"]
NAMES += [
    "a.__key__",
    "n" * 300 + ".png",
    "d/" * 200 + "x.png",
    "n" * 5000 + ".jpg",
    "\udcff.png",
    "写真/ü.png",
    "./a.png",
]
NAMES += ["a.png/", "-.png", "a\u2028b.png", "a.PNG", "s0.jpg", "s1.mask.png", "..png", "a..png", " .png", "~/a.png"]
TYPES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
TYPES += [tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.AREGTYPE, b"Z", b"V"]
PAX = [{"size": "999999999999"}, {"size": "-1"}, {"size": "1e9"}, {"path": "../../a.png"}, {"path": f"{OUTSIDE}/b.png"}]
PAX += [
    {"GNU.sparse.name": "x.png"},
    {"GNU.sparse.map": "0,9"},
    {"comment": "c" * 70_000},
    {"path": "p" * 9000 + ".png"},
]


def bend_members(members: Members, rng: random.Random) -> None:
    """Change what an archive holds, before it is packed."""
    place = rng.randrange(len(members))
    info, body = members[place]
    key = info.name.partition(".")[0]
    match rng.randrange(9):
        case 0:
            info.name = rng.choice(NAMES)
        case 1:
            info.type, info.linkname = rng.choice(TYPES), rng.choice((OUTSIDE, "../..", "s0.png", "/etc/passwd"))
            info.devmajor, info.devminor = 1, 5
        case 2:
            info.pax_headers = rng.choice(PAX)
        case 3:
            members.insert(rng.randrange(len(members) + 1), (rng.choice(members)[0], body))
        case 4:
            members.insert(rng.randrange(len(members)), members.pop(place))
        case 5:
            suffix = rng.choice(("pkl", "pyd", "pth", "pt", "pickle", "jpg", "npy", "joblib"))
            members.insert(
                place, (tarfile.TarInfo(rng.choice((f"{key}.{suffix}", f"bomb.{suffix}"))), pickle.dumps(Bomb()))
            )
        case 6:
            nested = [tar_bytes([("in/a.png", body)]), ZEROS_PACKED, bytes(1 << 19), b"", body]
            members.insert(
                place + 1, (tarfile.TarInfo(f"{key}.{rng.choice(('tar', 'gz', 'bin', 'x.jpg'))}"), rng.choice(nested))
            )
        case 7:
            members.insert(place, (tarfile.TarInfo(f"{key}.thumb"), rng.choice(small_images())))
        case _:
            bent = bent_image(rng.choice((body, rng.choice(small_images()))), rng)
            members[place] = info, bent if rng.random() < 0.8 else b""


# --- what is mutated -----------------------------------------------------------------------------------------------


@cache
def small_images() -> tuple[bytes, ...]:
    """One of every kind that is protected, and some that are not."""
    rgb, rgba, grey = noise(20, 24), noise(16, 16, 4), noise(12, 30, 1)
    made = [image_bytes(rgb, kind, **options) for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {}))]
    made += [image_bytes(rgba), image_bytes(grey), image_bytes(grey, "JPEG"), image_bytes(rgba, "WEBP", lossless=True)]
    made += [image_bytes(rgb, "GIF"), image_bytes(rgb, "JPEG", progressive=True), image_bytes(rgb, "TIFF")]
    return (*made, image_bytes(rgb, "BMP"))


BASES = [f"{form}{ending}" for form in ("gnu", "pax", "ustar") for ending in ("", ".gz")]
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def members_of(form: str) -> Members:
    files: list[tuple[str, bytes]] = [("folder/readme.txt", b"no picture")]
    for number, data in enumerate(small_images()[:7]):
        suffix = {b"\x89": "png", b"\xff": "jpg", b"R": "webp"}[data[:1]]
        files += [
            (f"s{number}.{suffix}", data),
            (f"s{number}.cls", str(number).encode()),
            (f"s{number}.json", b'{"a": 1}'),
        ]
    files.append((("long/" * 30 if form != "ustar" else "") + "ü.png", small_images()[0]))
    return [(tarfile.TarInfo(name), data) for name, data in files]


def shard_of(case: Case) -> bytes:
    """The bytes of a mutated shard."""
    form, _, packed = case.base.partition(".")
    members, later = members_of(form), []
    for rng in case.rngs():
        if rng.random() < 0.45:
            bend_members(members, rng)
        else:
            later.append(rng)
    try:
        data = tar_bytes(members, format=FORMATS[form])
    except ValueError:  # ustar cannot hold every name
        data = tar_bytes(members, format=tarfile.GNU_FORMAT)
    plain = [rng for rng in later if not packed or rng.random() < 0.5]
    for rng in plain:
        data = bent_header(data, rng) if rng.random() < 0.6 else bent(data, rng, [data], unit=512)
    if packed:
        if any(rng.random() < 0.1 for rng in later):
            data += bytes(1 << 24)  # a bomb of 16 MB
        data = gzip.compress(data, 1, mtime=0)
        for rng in (rng for rng in later if rng not in plain):
            data = bent(data, rng, [data, gzip.compress(data, mtime=0)])
    return data
