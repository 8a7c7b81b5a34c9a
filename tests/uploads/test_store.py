"""What uploads ask of storage: a listing in one order everywhere, one version read whole, a swap that is atomic."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import InputError, StoreError
from pipeline.storage.store import Store
from pipeline.uploads.origin import honours_conditions

ODD = ["a b.jpg", "ü.jpg", "100% + q.jpg", "a+b.jpg", "日本/名.png", "a/b.jpg", "a.b", "a-b", "a0", "a/b/c"]
ODD += ["#&'.jpg", "~.jpg"]


def test_the_walk_is_in_the_order_of_whole_names_and_agrees_with_info(store: Store) -> None:
    for name in ODD:
        store.put(name, name.encode())
    found = [entry for entry in store.walk() if not entry.name.startswith("_scumble/")]
    assert [entry.name for entry in found] == sorted(ODD)
    for entry in found:
        seen = store.info(entry.name)
        assert seen is not None
        assert (seen[:3], int(seen.modified)) == (entry[:3], int(entry.modified))
        assert abs(store.clock() - entry.modified) < 60
        assert store.read_if(entry.name, entry.etag) == entry.name.encode()


@pytest.mark.s3
def test_a_listing_of_many_pages_is_whole_and_streams(bucket: str) -> None:
    store = Store(f"{bucket}/many")
    names = sorted(f"{random.Random(n).random():.6f}/{n}.jpg" for n in range(2300))
    store.filesystem.pipe({store.path(name): b"" for name in names})
    assert [entry.name for entry in store.walk()] == names
    assert next(store.walk()).name == names[0]


def test_a_folder_that_is_not_there_is_an_input_error_and_links_are_not_followed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        list(Store(str(tmp_path / "none")).walk())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "in" / "x.jpg").symlink_to("/etc/hostname")
    assert [(entry.name, entry.etag) for entry in Store(str(tmp_path / "in")).walk()] == [("loop", ""), ("x.jpg", "")]


@pytest.mark.permissions
def test_a_part_that_cannot_be_listed_fails_the_listing(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(StoreError, match="cannot list"):
        list(Store(str(tmp_path)).walk())


def test_another_version_is_never_read(store: Store) -> None:
    store.put("a.jpg", b"before")
    etag = next(entry.etag for entry in store.walk() if entry.name == "a.jpg")
    time.sleep(0.01)
    store.put("a.jpg", b"after!")
    assert store.read_if("a.jpg", etag) is None
    assert store.read_if("gone.jpg", etag) is None


def test_only_the_version_that_was_seen_is_replaced(store: Store) -> None:
    assert store.look("x") is None
    assert store.replace_if("x", b"1", "0" * 32) is None
    store.create("x", b"1")
    seen = store.look("x")
    assert seen is not None
    assert (seen.data, abs(seen.age_s) < 30) == (b"1", True)
    new = store.replace_if("x", b"2", seen.etag)
    assert new is not None
    assert store.replace_if("x", b"3", seen.etag) is None
    again = store.look("x")
    assert again is not None
    assert (again.data, again.etag) == (b"2", new)
    assert honours_conditions(store)


def test_of_many_who_swap_at_once_one_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create("x", b"start")
    wins: dict[int, list[int]] = {turn: [] for turn in range(5)}
    for turn in wins:
        seen = store.look("x")
        assert seen is not None
        barrier = threading.Barrier(8)

        def race(me: int, turn: int = turn, etag: str = seen.etag, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if store.replace_if("x", b"%d %d" % (turn, me), etag) is not None:
                wins[turn].append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins[turn]) == 1
        assert store.read("x") == b"%d %d" % (turn, wins[turn][0])
