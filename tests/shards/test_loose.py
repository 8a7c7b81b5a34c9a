"""Loose images are samples: which files belong together, under which key, in which unit, and what is left out."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.errors import InputError, Reason, StoreError
from pipeline.records import LooseImage, Rejection, Sample, Shard, images_from_json, images_to_json
from pipeline.shards.inputs import resolve_input, without_unwritable
from pipeline.shards.loose import UNIT_BYTES, loose_images, units_of_images
from pipeline.shards.names import output_name
from pipeline.shards.samples import samples_of
from pipeline.storage.listings import Entry
from pipeline.storage.store import Store
from tests.support.samples import tar_bytes


def entries(*names: str, size: int = 1) -> list[Entry]:
    return [Entry(name, size, f"v{name}") for name in names]


def grouped(*names: str, keep: tuple[str, ...] = ()) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the files of each image by key, and what belongs to none."""
    images, others = loose_images(entries(*names), keep)
    return {image.key: [file.name for file in image.files] for image in images}, others


def test_a_key_is_the_path_without_its_extension_and_text_with_that_name_goes_along() -> None:
    found, others = grouped(
        "b/x.JPG", "a/x.png", "a/x.cls", "b/x.JPG.json", "b/x.caption.TXT", "a/y.txt", "z.npy", "README"
    )
    assert found == {"a/x": ["a/x.png", "a/x.cls"], "b/x": ["b/x.JPG", "b/x.JPG.json", "b/x.caption.TXT"]}
    assert others == ["README", "a/y.txt", "z.npy"]


def test_images_that_would_share_a_key_have_their_full_names_and_the_first_has_the_text() -> None:
    found, others = grouped("a.jpg", "a.PNG", "a.txt", "a.jpg.png", "b.webp", "b.2.webp", "A.jpg")
    assert found == {
        "A": ["A.jpg"],
        "a.PNG": ["a.PNG", "a.txt"],
        "a.jpg": ["a.jpg"],
        "a.jpg.png": ["a.jpg.png"],
        "b.2": ["b.2.webp"],
        "b": ["b.webp"],
    }
    assert others == []


def test_a_kept_suffix_is_a_sidecar_and_no_image_of_its_own() -> None:
    names = ("a.jpg", "a.seg.png", "a.npy", "b.seg.png")
    assert grouped(*names) == ({"a": ["a.jpg"], "a.seg": ["a.seg.png"], "b.seg": ["b.seg.png"]}, ["a.npy"])
    assert grouped(*names, keep=("seg.png", "npy")) == ({"a": ["a.jpg", "a.npy", "a.seg.png"]}, ["b.seg.png"])


@pytest.mark.parametrize(("count", "largest", "units"), [(1, 1, 1), (17, 16, 2), (1024, 16, 64), (100_000, 512, 196)])
def test_units_are_cut_by_count_whatever_the_order_of_the_listing(count: int, largest: int, units: int) -> None:
    listing = entries(*(f"{number:06d}.jpg" for number in range(count)))
    images, _ = loose_images(reversed(listing))
    found = units_of_images(images)
    assert found == units_of_images(loose_images(listing)[0])
    assert [len(found), max(len(unit.images) for unit in found)] == [units, largest]
    assert [image for unit in found for image in unit.images] == images
    assert [unit.name for unit in found] == sorted(unit.name for unit in found)


def test_units_are_cut_by_bytes_and_a_changed_file_changes_only_its_own() -> None:
    listing = entries(*(f"{number}.jpg" for number in range(8)), size=UNIT_BYTES // 2)
    before = units_of_images(loose_images(listing)[0])
    assert [len(unit.images) for unit in before] == [2, 2, 2, 2]
    listing[3] = listing[3]._replace(etag="other")
    after = units_of_images(loose_images(listing)[0])
    assert [ours.etag == theirs.etag for ours, theirs in zip(before, after, strict=True)] == [True, False, True, True]
    assert images_from_json(images_to_json(after[1].images)) == after[1].images


def write(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def read(store: Store, unit: Shard, limit: int = 1 << 20) -> list[Sample | Rejection]:
    return list(samples_of(store, unit, max_member_bytes=limit))


def test_the_samples_of_a_unit_are_those_of_a_tar_of_the_same_files(store: Store) -> None:
    for name, data in {"d/b.jpg": b"B", "d/b.cls": b"1", "a.PNG": b"A" * 9, "d/b.jpg.json": b"{}"}.items():
        store.put(name, data)
    (unit,) = resolve_input(store.url).shards
    large, small = read(store, unit, limit=8)
    assert isinstance(large, Rejection)
    assert (large.key, large.member, large.reason) == ("a", "a.PNG", Reason.TOO_LARGE)
    assert small == Sample("d/b", {"jpg": b"B", "cls": b"1", "jpg.json": b"{}"})
    assert isinstance(small, Sample)
    assert list(small.members) == ["jpg", "cls", "jpg.json"]


def test_a_file_that_is_replaced_or_gone_after_the_listing_stops_the_run(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jpg": b"1", "b.jpg": b"2"})
    store = Store(str(tmp_path))
    (unit,) = resolve_input(store.url).shards
    (tmp_path / "b.jpg").write_bytes(b"3")
    with pytest.raises(InputError, match=r"^changed-input: .*/b\.jpg is now .*, but was planned as"):
        read(store, unit)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"^changed-input: .*/a\.jpg is gone"):
        read(store, unit)
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"^changed-input: .*/a\.jpg is now"):
        read(store, unit)


def test_a_tar_that_is_written_anew_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    """As `cp` and `rsync --inplace` write: the open file changes, and no read fails."""
    versions = [tar_bytes([(f"{number}.jpg", bytes([value]) * 9_000_000) for number in range(4)]) for value in (1, 2)]
    (tmp_path / "a.tar").write_bytes(versions[0])
    listing = resolve_input(str(tmp_path))
    (shard,) = listing.shards
    samples = samples_of(listing.store, shard, max_member_bytes=1 << 30)
    first = next(samples)
    assert isinstance(first, Sample)
    assert set(first.members["jpg"]) == {1}
    time.sleep(0.01)  # of a coarse clock, a new tick
    with (tmp_path / "a.tar").open("r+b") as file:
        file.write(versions[1])
    with pytest.raises(InputError, match=r"changed-input: .*a\.tar is now"):
        list(samples)
    assert len(list(samples_of(listing.store, shard, max_member_bytes=1 << 30, any_version=True))) == 4


@pytest.mark.permissions
def test_a_file_that_may_not_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jpg": b"1"})
    (tmp_path / "a.jpg").chmod(0)
    (unit,) = resolve_input(str(tmp_path)).shards
    with pytest.raises(StoreError, match=r"a\.jpg: .*; check the owner and permissions") as caught:
        read(Store(str(tmp_path)), unit)
    assert "\n" not in str(caught.value)


def test_links_to_folders_fifos_and_names_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write(
        source, **{"a.jpg": b"1", ".jpg": b"2", "x/.png.png": b"3", "b\\c.jpg": b"4", "._a.jpg": b"5", "a.b/jpg": b"6"}
    )
    write(tmp_path, **{"elsewhere/d.jpg": b"7"})
    os.mkfifo(source / "p.jpg")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "d.jpg")
    (source / "lost.jpg").symlink_to("nowhere")
    found = resolve_input(str(source))
    assert list(found.names) == ["a.jpg", "linked.jpg"]
    assert {one.key: one.reason for one in found.passed_over} == {
        ".jpg": Reason.UNUSABLE_NAME,
        "x/.png.png": Reason.UNUSABLE_NAME,
        "b\\c.jpg": Reason.UNSAFE_NAME,
        "p.jpg": Reason.NOT_A_FILE,
        "link": Reason.NOT_A_FILE,
        "lost.jpg": Reason.NOT_A_FILE,
    }
    assert found.others == ["a.b/jpg"]


def test_images_whose_names_the_output_cannot_hold_are_left_out_before_the_start(bucket: str, tmp_path: Path) -> None:
    source, output = Store(f"{bucket}/folder"), Store(str(tmp_path / "out"))
    fits, grows = "é" * 125 + ".jpg", "é" * 124 + "x.jpg"  # 254 and 253 bytes; .png makes them 258 and 257
    for name in ("a.jpg", "a.jpg/b.jpg", fits, grows, "a.cls"):
        source.put(name, b"x")
    listing = resolve_input(source.url)
    same = without_unwritable(listing, output, layout.assignment, partial(output_name, encode="same"))
    assert sorted(same.names) == sorted(["a.jpg", "a.cls", fits, grows])
    assert same.passed_over[0].detail == "in the output: a.jpg is an image, not a folder"
    other = without_unwritable(listing, output, layout.assignment, partial(output_name, encode="lossless"))
    assert sorted(other.names) == ["a.cls", "a.jpg", "a.jpg/b.jpg"]  # there, a.jpg becomes a.jpg.png
    names = {image.key for shard in other.shards for image in shard.images}
    assert names == {"a", "a.jpg/b"}


def test_names_that_differ_in_case_alone_are_not_written_to_a_disk_that_ignores_case(tmp_path: Path) -> None:
    files = ("a.jpg", "A.JPG", "b/c.jpg", "b/c.txt", "B/C.png", "B/C.TXT", "d.tar", "D.tar")
    write(tmp_path / "in", **dict.fromkeys(files, b"1"))
    listing = resolve_input(f"{tmp_path}/in")
    kept = {}
    for name, links in (("minds", ()), ("ignores", ("pROTECTED",))):
        disk = tmp_path / name
        disk.mkdir()
        (disk / "Protected").touch()
        for link in links:  # the same file under its name in the other case, as such a disk shows it
            (disk / link).hardlink_to(disk / "Protected")
        output = Store(str(disk / "out"))
        assert output.ignores_case == bool(links)
        found = without_unwritable(listing, output, layout.assignment)
        kept[name] = sorted(found.names)
        refused = {rejection.key: rejection.detail for rejection in found.passed_over}
    assert kept["minds"] == sorted(files)
    assert kept["ignores"] == ["A.JPG", "B/C.TXT", "B/C.png", "D.tar"]
    assert refused["a.jpg"] == "in the output: it differs from A.JPG in case alone, and that disk ignores case"
    assert sorted(refused) == ["a.jpg", "b/c.jpg", "d.tar"]


def test_an_empty_folder_is_judged_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "Out").mkdir()
    assert not Store(f"{tmp_path}/Out").ignores_case
    (tmp_path / "oUT").symlink_to(tmp_path / "Out")  # as such a disk shows it
    assert Store(f"{tmp_path}/Out").ignores_case


def test_one_file_and_a_pattern_are_inputs_too(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jpg": b"1", "b/c.jpg": b"2", "b/c.cls": b"3", "d.png": b"4"})
    assert list(resolve_input(f"{tmp_path}/a.jpg").names) == ["a.jpg"]
    assert list(resolve_input(f"{tmp_path}/*.png").names) == ["d.png"]
    assert list(resolve_input(f"{tmp_path}/**/c.*").names) == ["b/c.jpg", "b/c.cls"]
    (image,) = resolve_input(f"{tmp_path}/b").shards[0].images
    assert isinstance(image, LooseImage)
    assert image.key == "c"
