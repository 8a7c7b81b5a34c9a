"""The reader refuses what it must and loses nothing else; the writer's bytes depend on the samples alone."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import Reason
from pipeline.records import Rejection, Sample
from pipeline.shards.tar import read_samples, split_name
from tests.support.samples import read, tar_bytes

GOOD = [("a.jpg", b"A" * 700), ("a.cls", b"1"), ("b.jpg", b"B"), ("b.cls", b""), ("c.jpg", b"C" * 512)]
SAMPLES = [
    Sample("a", {"jpg": b"A" * 700, "cls": b"1"}),
    Sample("b", {"jpg": b"B", "cls": b""}),
    Sample("c", {"jpg": b"C" * 512}),
]


def special(name: str, kind: bytes, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def reasons(items: list[Sample | Rejection]) -> list[tuple[str, str]]:
    return [(item.key, item.reason.value) for item in items if isinstance(item, Rejection)]


def keys(items: list[Sample | Rejection]) -> list[str]:
    return [item.key for item in items if isinstance(item, Sample)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_come_in_input_order_from_every_tar_format(mode: str, form: int) -> None:
    assert read(tar_bytes(GOOD, mode, format=form)) == SAMPLES


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="/.\\", exclude_categories=("C",)), min_size=1, max_size=120),
            st.binary(max_size=1100),
        ),
        max_size=6,
        unique_by=lambda pair: pair[0],
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(deadline=None, max_examples=60)
def test_names_and_bytes_are_those_that_the_standard_library_reads(pairs: list, form: int) -> None:
    data = tar_bytes([(f"dir/{stem}.x.jpg", body) for stem, body in pairs], format=form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}
    found = {f"{item.key}.{name}": body for item in read(data) for name, body in item.members.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a.jpg", "a", "jpg"),
        ("x.y/v1.2.jpg", "x.y/v1", "2.jpg"),
        ("./a.seg.png", "./a", "seg.png"),
        (".DS_Store", "", "DS_Store"),
        ("none", "none", ""),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_base_name(name: str, key: str, suffix: str) -> None:
    assert split_name(name) == (key, suffix)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/a.jpg", "unsafe-name"),
        ("C:/a.jpg", "unsafe-name"),
        ("../a.jpg", "unsafe-name"),
        ("x/../../a.jpg", "unsafe-name"),
        ("x\\a.jpg", "unsafe-name"),
        ("x\na.jpg", "unsafe-name"),
        ("x\x1b[2Ja.jpg", "unsafe-name"),
        ("a", "unusable-name"),
        (".hidden", "unusable-name"),
        ("x/.jpg", "unusable-name"),
        ("a.", "unusable-name"),
        ("a.__key__", "unusable-name"),
        ("a" * 5000 + ".jpg", "unusable-name"),
    ],
)
def test_a_bad_name_costs_its_sample_and_no_other(name: str, reason: str) -> None:
    items = read(tar_bytes([("m.jpg", b"1"), (name, b"2"), ("n.jpg", b"3")]))
    assert keys(items) == ["m", "n"]
    assert [found for _, found in reasons(items)] == [reason]


def test_a_null_byte_in_a_pax_name_is_refused() -> None:
    info = tarfile.TarInfo("ok.jpg")
    info.pax_headers = {"path": "ok.jpg\x00.txt"}
    items = read(tar_bytes([(info, b"1"), ("n.jpg", b"3")], format=tarfile.PAX_FORMAT))
    assert [found for _, found in reasons(items)] == ["unsafe-name"]
    assert keys(items) == ["n"]


def test_a_name_that_is_not_utf8_is_refused_and_can_be_logged() -> None:
    items = read(tar_bytes([("caf\udce9.jpg", b"1"), ("n.jpg", b"3")], format=tarfile.GNU_FORMAT))
    assert reasons(items) == [("caf\\udce9", "unusable-name")]
    assert keys(items) == ["n"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_cost_their_whole_sample(kind: bytes) -> None:
    link = special("a.txt", kind, linkname="/etc/passwd", size=0)
    items = read(tar_bytes([("a.jpg", b"1"), (link, b""), ("b.jpg", b"2")]))
    assert reasons(items) == [("a", "not-a-file")]
    assert keys(items) == ["b"]


def test_folders_are_skipped_silently() -> None:
    folder = special("x", tarfile.DIRTYPE, mode=0o755)
    assert read(tar_bytes([(folder, b""), ("x/a.jpg", b"1")])) == [Sample("x/a", {"jpg": b"1"})]


def test_a_member_over_the_cap_is_not_read_and_its_sample_goes_whole() -> None:
    data = tar_bytes([("a.cls", b"1"), ("a.jpg", bytes(50_000_000)), ("a.txt", b"t"), ("b.jpg", b"2")], "w:gz")
    tracemalloc.start()
    items = read(data, max_member_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(items) == [("a", "too-large")]
    assert keys(items) == ["b"]
    assert peak < 4_000_000


def test_a_sample_of_endless_members_is_refused_in_bounded_memory() -> None:
    members = [(f"a.{index}", b"") for index in range(5000)]
    assert reasons(read(tar_bytes([*members, ("b.jpg", b"2")]))) == [("a", "too-large")]


def test_a_duplicate_member_costs_the_sample_even_in_another_case() -> None:
    for second in ("a.txt", "a.TXT"):
        items = read(tar_bytes([("a.jpg", b"1"), ("a.txt", b"2"), (second, b"3"), ("b.jpg", b"4")]))
        assert reasons(items) == [("a", "duplicate-member")]
        assert keys(items) == ["b"]


def test_a_key_that_comes_back_is_refused_the_second_time() -> None:
    items = read(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3"), ("c.jpg", b"4")]))
    assert keys(items) == ["a", "b", "c"]
    assert [item for item in items if isinstance(item, Rejection)] == [
        Rejection("a", "a.cls", Reason.INTERLEAVED_KEY, "this key already occurred in the shard, before another key")
    ]


def test_sparse_members_are_refused_and_reading_goes_on() -> None:
    pax = tarfile.TarInfo("a.jpg")
    pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
    items = read(tar_bytes([(pax, b"1\n0\n1\n"), ("b.jpg", b"2")], format=tarfile.PAX_FORMAT))
    assert reasons(items) == [("a", "not-a-file")]
    assert keys(items) == ["b"]

    old = tarfile.TarInfo("a.jpg")
    header = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = b"S", 1  # its map goes on in two more blocks
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    items = read(bytes(header) + bytes(more) + last + tar_bytes([("b.jpg", b"2")]))
    assert reasons(items) == [("a", "not-a-file")]
    assert keys(items) == ["b"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_silly_size_is_not_read(kind: bytes) -> None:
    lie = special("a", kind, size=1 << 40).tobuf(tarfile.GNU_FORMAT)
    data = tar_bytes([("m.jpg", b"1"), ("n.jpg", b"2")])[:2048] + lie + bytes(3_000_000)
    tracemalloc.start()
    items = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys(items) == ["m"]
    assert reasons(items) == [("n", "truncated-shard")]
    assert peak < 2_000_000


def test_a_gzip_bomb_is_passed_over_in_bounded_memory() -> None:
    head = special("a.jpg", tarfile.REGTYPE, size=200_000_000).tobuf(tarfile.GNU_FORMAT)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(200):
            file.write(bytes(1_000_000))
    tracemalloc.start()
    items = read(buffer.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(items)[0] == ("a", "too-large")
    assert peak < 4_000_000


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_at_any_place_never_raises_and_loses_no_complete_sample(mode: str) -> None:
    bodies = [
        (f"s{index}.{suffix}", random.Random(index).randbytes(90 * index))
        for index in range(9)
        for suffix in ("jpg", "cls")
    ]
    data = tar_bytes(bodies, mode)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        starts = {member.name: member.offset + 512 for member in tar}  # a header ends here
    whole = read(data)
    for cut in range(0, len(data), 97):
        items = read(data[:cut])
        found = [item for item in items if isinstance(item, Sample)]
        assert found == whole[: len(found)]
        lost = [item for item in items if isinstance(item, Rejection)]
        if len(found) < len(whole):
            assert [item.reason for item in lost] == [Reason.TRUNCATED_SHARD]
            assert lost[0].key in ("", whole[len(found)].key)
        arrived = cut if mode == "w" else len(zlib.decompressobj(31).decompress(data[:cut]))
        begun = sum(starts[f"s{index}.jpg"] <= arrived for index in range(9))
        assert len(found) >= begun - 1


def test_a_cut_between_two_members_does_not_pass_for_the_end() -> None:
    items = read(tar_bytes(GOOD)[: 512 + 1024])  # a.jpg is there, a.cls is not
    assert reasons(items) == [("a", "truncated-shard")]
    assert keys(items) == []


def test_flipped_bytes_in_a_header_cost_what_is_next_to_them_and_no_more() -> None:
    data = bytearray(tar_bytes([*GOOD, ("d.jpg", b"D")]))
    data[data.index(b"b.jpg")] ^= 0xFF
    items = read(bytes(data))
    assert reasons(items) == [("a", "truncated-shard"), ("b", "truncated-shard")]
    assert keys(items) == ["c", "d"]
    detail = next(item.detail for item in items if isinstance(item, Rejection))
    assert detail == (
        "the shard is damaged: bytes 2,560 to 3,583 (1,024 bytes) are not valid tar members and were not read "
        "(a wrong header checksum)"
    )


def test_a_checksum_of_gzip_that_does_not_hold_is_told_although_all_was_unpacked() -> None:
    packed = bytearray(tar_bytes(GOOD, "w:gz"))
    packed[-6] ^= 0xFF
    items = read(bytes(packed))
    assert (keys(items), reasons(items)) == (["a", "b", "c"], [("", "truncated-shard")])


def test_a_hole_of_zeros_and_bytes_that_were_put_in_between_are_jumped_over() -> None:
    many = [(f"{index:03d}.jpg", random.Random(index).randbytes(3000)) for index in range(40)]
    data = tar_bytes(many)
    for damaged in (
        data[:20_000] + bytes(30_000) + data[50_000:],
        data[:20_000] + b"put in between" + data[20_000:],
        data[:20_000] + data[20_777:],
    ):
        items = read(damaged)
        whole = [
            item for item in items if isinstance(item, Sample) and item.members["jpg"] == dict(many)[f"{item.key}.jpg"]
        ]
        assert len(whole) >= 28
        assert {reason for _, reason in reasons(items)} == {"truncated-shard"}
        assert len(reasons(items)) <= 3


@given(st.binary(max_size=3000))
@settings(deadline=None, max_examples=100)
def test_bytes_that_are_no_tar_are_one_rejection(data: bytes) -> None:
    assert [reason for _, reason in reasons(read(data + b"x"))] == ["truncated-shard"]
    assert [reason for _, reason in reasons(read(b"\x1f\x8b" + data))] == ["truncated-shard"]


@given(st.integers(0, 2**32), st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=80)
def test_random_damage_never_raises(seed: int, flips: int, packed: bool) -> None:
    data = bytearray(tar_bytes(GOOD, "w:gz" if packed else "w"))
    for index in range(flips):
        place = (seed * (index + 1) * 2654435761) % len(data)
        data[place] ^= 1 + (seed + index) % 255
    for item in read(bytes(data)):
        assert isinstance(item, (Sample, Rejection))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_joined_archives_are_read_one_after_the_other(mode: str) -> None:
    items = read(b"".join(tar_bytes([(f"{index}.jpg", b"Z")], mode) for index in range(4)))
    assert (keys(items), reasons(items)) == (["0", "1", "2", "3"], [])
    items = read(tar_bytes(GOOD, mode) + tar_bytes(GOOD[:2], mode))
    assert (keys(items), reasons(items)) == (["a", "b", "c"], [("a", "interleaved-key")])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_follows_the_end_and_is_no_archive_is_told_and_costs_no_sample(mode: str) -> None:
    items = read(tar_bytes(GOOD, mode) + b"garbage" * 5000)
    assert (keys(items), reasons(items)) == (["a", "b", "c"], [("", "truncated-shard")])
    items = read(tar_bytes(GOOD, mode) + b"garbage" * 5000 + tar_bytes([("y.jpg", b"Y"), ("z.jpg", b"Z")], mode))
    assert keys(items) == (["a", "b", "c", "z"] if mode == "w" else ["a", "b", "c"])
    assert ("", "truncated-shard") in reasons(items)


def test_more_zeros_than_an_archive_ends_with_are_a_hole() -> None:
    assert reasons(read(tar_bytes(GOOD) + bytes(1 << 19))) == []
    items = read(tar_bytes(GOOD) + bytes(2 << 20))
    assert (keys(items), reasons(items)) == (["a", "b", "c"], [("", "truncated-shard")])
    assert reasons(read(bytes(3 << 20))) == [("", "truncated-shard")]


def test_a_cut_names_its_place_and_what_is_missing() -> None:
    (item,) = [one for one in read(tar_bytes(GOOD)[:700]) if isinstance(one, Rejection)]
    assert (item.key, item.member) == ("a", "a.jpg")
    assert item.detail == "the shard ends at byte 700, with at least 512 bytes missing"
    packed = tar_bytes([("a.jpg", random.Random(0).randbytes(100_000))], "w:gz")
    torn = packed[:60_000] + b"xxxx" + packed[60_004:]
    (item,) = [one for one in read(torn + bytes(10)) if isinstance(one, Rejection)]
    assert "more compressed bytes were not read" in item.detail


def test_what_a_mac_writes_beside_files_and_volume_labels_are_no_samples() -> None:
    note = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
    label = special("BACKUP", b"V", size=0)
    members = [
        (label, b""),
        ("x/._a.jpg", note),
        ("x/a.jpg", b"1"),
        (".DS_Store", b"\x00\x00\x00\x01Bud1" + bytes(6140)),
    ]
    items = read(tar_bytes([*members, ("x/._a.cls", note * 100), ("x/b.jpg", b"2")]))
    assert (keys(items), reasons(items)) == (["x/a", "x/b"], [])
    assert reasons(read(tar_bytes([(special("a.jpg", b"V", size=3), b"jpg")]))) == [("a", "not-a-file")]
    assert reasons(read(tar_bytes([("x/._a.jpg", b"\xff\xd8\xff a picture")]))) == [("x/._a.jpg", "unusable-name")]


def test_an_empty_archive_has_no_samples_and_an_empty_file_is_damaged() -> None:
    assert read(tar_bytes([])) == []
    assert reasons(read(b"")) == [("", "truncated-shard")]


def test_errors_of_the_store_are_not_taken_for_damage() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError("the store went away")

    with pytest.raises(ConnectionResetError):
        list(read_samples(Broken(), max_member_bytes=1))


def test_the_reader_never_seeks_and_holds_one_sample() -> None:
    def pieces() -> Iterator[bytes]:
        for index in range(400):
            yield tar_bytes([(f"{index:04d}.jpg", bytes(100_000))])[: 512 + 100_352]
        yield bytes(1024)

    class Pipe:
        def __init__(self) -> None:
            self.source, self.rest = pieces(), b""

        def read(self, size: int) -> bytes:
            while len(self.rest) < size and (more := next(self.source, b"")):
                self.rest += more
            head, self.rest = self.rest[:size], self.rest[size:]
            return head

    stream: IO[bytes] = Pipe()  # type: ignore[assignment]
    tracemalloc.start()
    count = sum(isinstance(item, Sample) for item in read_samples(stream, max_member_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400
    assert peak < 2_500_000
