"""What is new is what the listing has and the ledger has not; neither is ever held, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.errors import Reason, SettingsError, StoreError
from pipeline.quantities import parse_bytes, parse_seconds
from pipeline.shards.names import fault_of, output_name, sample_name
from pipeline.storage.listings import Entry
from pipeline.uploads.listing import Known, LookedAhead, Tally, changes
from pipeline.uploads.names import upload_kind
from pipeline.uploads.settings import UploadSettings, uploads_from
from pipeline.uploads.units import Item, Unit, units_of

NOW = 1_000_000.0


def found(entries: list[Entry], known: list[Known], settle_s: float = 30.0) -> tuple[list[Item], Tally]:
    tally = Tally()
    items = changes(entries, known, now=NOW, settle_s=settle_s, fault=lambda name: None, tally=tally)
    return list(items), tally


def entry(name: str, etag: str = "1", age_s: float = 3600.0) -> Entry:
    return Entry(name, 10, etag, NOW - age_s)


def test_new_changed_known_skipped_and_deleted_are_told_apart() -> None:
    entries = [entry("a.jpg"), entry("b.PNG", "2"), entry("c.txt"), entry("d.tar"), entry("e.webp")]
    items, tally = found(entries, [("a.jpg", "1", 4), ("aa.jpg", "1", 1), ("b.PNG", "1", 3), ("z.jpg", "1", 1)])
    assert [(item.name, item.kind, item.version) for item in items] == [
        ("b.PNG", "image", 4),
        ("d.tar", "shard", 1),
        ("e.webp", "image", 1),
    ]
    assert (tally.listed, tally.known, tally.new, tally.changed, tally.skipped) == (5, 1, 2, 1, 1)
    assert (tally.deleted, tally.deleted_names) == (2, ["aa.jpg", "z.jpg"])


def test_what_may_be_a_picture_or_hold_some_is_quarantined_once_and_not_passed_over() -> None:
    unread = ["a.heic", "b.zip", "c.tif", "d.tar.xz", "e.jpe", "f.jpg.gz"]
    entries = [entry(name) for name in unread] + [entry("g.txt"), entry("h/.DS_Store"), entry("link", etag="")]
    items, tally = found(entries, [])
    assert {item.name: item.fault[0].value for item in items if item.fault} == dict.fromkeys(
        unread, "unsupported-format"
    ) | {"link": "not-a-file"}
    assert (tally.new, tally.skipped) == (7, 2)
    items, tally = found(entries, [(item.name, item.etag, 1) for item in items])
    assert (items, tally.known, tally.skipped) == ([], 7, 2)


def test_what_changed_less_than_the_settle_time_ago_is_left_for_the_next_run() -> None:
    ages = {"a.jpg": 29.0, "b.jpg": 31.0, "c.jpg": -5.0, "d.jpg": -200_000.0}  # d: somebody set a time years ahead
    items, tally = found([entry(name, age_s=age) for name, age in ages.items()], [])
    assert [item.name for item in items] == ["b.jpg", "d.jpg"]
    assert (tally.unsettled, tally.new) == (2, 2)
    assert len(found([entry("a.jpg", age_s=-0.7)], [], settle_s=0)[0]) == 1
    items, tally = found([entry("a.jpg", "2", 1.0)], [("a.jpg", "1", 1)])
    assert (items, tally.unsettled, tally.changed, tally.deleted) == ([], 1, 0, 0)


def test_a_store_that_does_not_list_in_order_is_refused() -> None:
    with pytest.raises(StoreError, match=r"lists a\.jpg after b\.jpg, but listings must be in byte order"):
        found([entry("b.jpg"), entry("a.jpg")], [])


NAMES = st.lists(st.text(alphabet="ab./é", min_size=1, max_size=6).map(lambda s: s + ".jpg"), unique=True, max_size=30)


@given(NAMES, NAMES, st.sets(st.integers(0, 29)))
@hypothesis_settings(deadline=None, max_examples=100)
def test_the_merge_is_the_difference_of_two_sets(listed: list[str], done: list[str], same: set[int]) -> None:
    entries = sorted((entry(name, str(number)) for number, name in enumerate(listed)), key=lambda one: one.name)
    etags = {name: str(number) if number in same else "old" for number, name in enumerate(listed)}
    known = sorted((name, etags.get(name, "x"), 1) for name in done)
    items, tally = found(entries, known)
    before = {name: etag for name, etag, _ in known}
    assert [item.name for item in items] == [one.name for one in entries if before.get(one.name) != one.etag]
    assert tally.deleted == len(set(done) - set(listed))
    assert tally.known + tally.new + tally.changed == tally.listed == len(listed)


def test_a_hundred_thousand_keys_are_read_side_by_side_and_never_held() -> None:
    ahead = {"listed": 0, "known": 0, "most": 0}

    def count(which: str, names: Iterator[str]) -> Iterator[str]:
        for name in names:
            ahead[which] += 1
            ahead["most"] = max(ahead["most"], abs(ahead["listed"] - ahead["known"]))
            yield name

    def names() -> Iterator[str]:
        return (f"folder {number:06d}/ü %+.jpg" for number in range(100_000))

    entries = (entry(name) for name in count("listed", names()))
    known = ((name, "1", 1) for name in count("known", names()))
    tally = Tally()
    assert list(changes(entries, known, now=NOW, settle_s=0, fault=lambda name: None, tally=tally)) == []
    assert tally.known == 100_000
    assert ahead["most"] <= 2


def test_looking_ahead_changes_nothing_but_what_is_known_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(count: int, broken: bool = False) -> Iterator[Item]:
        for number in range(count):
            drawn.append(number)
            yield Item(f"{number:03d}.jpg", 1, "1", "image")
        if broken:
            raise StoreError("the store is down")

    drawn: list[int] = []
    ahead = LookedAhead(items(100))
    assert next(ahead).name == "000.jpg"
    assert drawn == [0]  # it looks only when it is told to
    ahead.look(0.0)
    assert (drawn, ahead.is_whole) == ([0], False)
    ahead.look(1e9)
    assert (len(drawn), ahead.is_whole) == (100, True)
    assert [item.name for item in ahead] == [f"{number:03d}.jpg" for number in range(1, 100)]
    broken = LookedAhead(items(3, broken=True))
    broken.look(1e9)
    assert [next(broken).name for _ in range(3)] == ["000.jpg", "001.jpg", "002.jpg"]
    with pytest.raises(StoreError, match="the store is down"):
        next(broken)
    assert not broken.is_whole
    monkeypatch.setattr("pipeline.uploads.listing.MOST_AHEAD", 5)
    drawn.clear()
    bounded = LookedAhead(items(100))
    bounded.look(1e9)
    assert len(drawn) == 5
    assert len(list(bounded)) == 100


def test_units_grow_and_hold_no_more_than_they_are_asked_to() -> None:
    items = [Item(f"{number:03d}.jpg", 10, "1", "image") for number in range(60)]
    taken = iter(items)
    units = units_of(taken, max_images=16, max_bytes=1 << 20)
    assert next(units).items == (items[0],)
    assert next(taken) is items[1]  # no item was taken ahead of the first unit
    assert [len(unit.items) for unit in units_of(items, max_images=16, max_bytes=1 << 20)] == [1, 2, 4, 8, 16, 16, 13]
    assert [len(unit.items) for unit in units_of(items[:9], max_images=16, max_bytes=25)] == [1, 2, 2, 2, 2]
    large = [Item("a.jpg", 99, "1", "image"), Item("b.tar", 10, "1", "shard"), Item("c.jpg", 1, "1", "image")]
    found = [[item.name for item in unit.items] for unit in units_of(large, max_images=16, max_bytes=25)]
    assert found == [["a.jpg"], ["b.tar"], ["c.jpg"]]


def test_a_units_name_is_the_step_that_it_makes() -> None:
    first, second = Item("a.jpg", 1, "1", "image", 1), Item("a.jpg", 1, "1", "image", 2)
    assert Unit((first,)).id == Unit((Item("a.jpg", 1, "1", "image", 1),)).id
    assert Unit((first,)).id != Unit((second,)).id  # an image that was changed and changed back is a third version


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "image"),
        ("A/b.JPEG", "image"),
        ("x.y.WebP", "image"),
        ("t.tar", "shard"),
        ("t.TAR.GZ", "shard"),
        ("a.gif", None),
        ("jpg", None),
        ("a.jpg/readme", None),
        ("_scumble/a.jpg", None),
        ("a.jpg.part", None),
        ("x/._a.jpg", None),
        ("t.tgz", "shard"),
    ],
)
def test_images_and_shards_are_known_by_their_names(name: str, kind: str | None) -> None:
    assert upload_kind(name) == kind


def test_a_sample_is_called_as_in_a_shard() -> None:
    assert sample_name("000/0001.jpg") == ("000/0001", "jpg")
    assert sample_name("a.b/my.photo.JPG") == ("a.b/my.photo", "JPG")


@given(st.lists(st.text("ab.", max_size=4), min_size=1, max_size=3), st.sampled_from(["same", "lossless", "jpeg:90"]))
def test_no_two_images_are_called_the_same_in_the_output(stems: list[str], encode: str) -> None:
    kinds = ("jpg", "png", "jpeg", "webp", "JPG", "jpg.png", "png.png", "jpg.jpg", "webp.png.png", "png.jpg")
    names = {f"{stem}.{kind}" for stem in stems for kind in kinds}
    assert len({output_name(name, encode) for name in names}) == len(names)


def test_names_change_only_where_the_format_does() -> None:
    assert output_name("a/b.jpg", "same") == "a/b.jpg"
    assert [output_name(name, "lossless") for name in ("a.png", "a.jpg", "a.jpg.png")] == [
        "a.png",
        "a.jpg.png",
        "a.jpg.png.png",
    ]
    assert [output_name(name, "jpeg:90") for name in ("a.JPG", "a.jpeg", "a.png")] == ["a.JPG", "a.jpeg", "a.png.jpg"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../a.jpg", Reason.UNSAFE_NAME),
        ("a/../../b.jpg", Reason.UNSAFE_NAME),
        ("/a.jpg", Reason.UNSAFE_NAME),
        ("a//b.jpg", Reason.UNSAFE_NAME),
        ("a/./b.jpg", Reason.UNSAFE_NAME),
        ("a\\b.jpg", Reason.UNSAFE_NAME),
        ("a\nb.jpg", Reason.UNSAFE_NAME),
        ("a.jpg?versionId=b.jpg", Reason.UNSAFE_NAME),
        ("\udcff.jpg", Reason.UNUSABLE_NAME),
        ("a b/ü/100% + q?*[{~#&'\".jpg", None),
        ("x" * 251 + ".jpg", None),
        ("日本/" * 40 + "名.jpg", None),
    ],
)
def test_names_that_would_leave_the_prefix_or_become_others_are_refused(name: str, reason: Reason | None) -> None:
    fault = fault_of(name)
    assert (fault and fault[0]) == reason


def test_times_and_sizes_are_read_as_people_write_them() -> None:
    assert [parse_seconds(text) for text in ("30", "30s", "1.5m", "2h", "1d")] == [30, 30, 90, 7200, 86400]
    assert [parse_bytes(text) for text in ("7", "1k", "64M", "1GiB")] == [7, 1024, 64 << 20, 1 << 30]
    for text in ("", "1w", "x", "-1"):
        with pytest.raises(ValueError, match=f"^{text}$"):
            parse_seconds(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--input is missing"),
        ({"input": "a", "output": "b"}, "--protection is missing"),
        ({"unit_images": 0}, "--unit-images must be at least 1; it is 0"),
        ({"max_drift": 2.0}, "--max-drift is a share between 0 and 1"),
        ({"workers": 2}, "add --ray"),
        ({"dry_run": True, "watch": 1.0}, "omit --watch"),
        ({"setle": 1}, "did you mean settle"),
        ({"encode": "gif"}, "--encode 'gif' is not one of same, lossless, jpeg:1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict[str, object], message: str) -> None:
    whole = given if not given or "input" in given else {"input": "a", "output": "b", "protection": "p"} | given
    with pytest.raises(SettingsError, match=message):
        uploads_from(whole)
    assert UploadSettings(input="a", output="b", protection="p").settle == 30
