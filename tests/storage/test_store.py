"""One door to storage, tried on a folder and on a server that speaks S3."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from pipeline.errors import InputError, StoreError
from pipeline.shards.inputs import resolve_input
from pipeline.storage.failures import may_pass
from pipeline.storage.store import Store


def test_what_was_put_is_listed_and_read_back(store: Store) -> None:
    store.put("b/two.tar", b"22")
    store.put("a.tar", b"1")
    assert [(entry.name, entry.size) for entry in store.list()] == [("a.tar", 1), ("b/two.tar", 2)]
    assert store.read("b/two.tar") == b"22"
    with store.open("a.tar") as stream:
        assert stream.read() == b"1"


def test_an_empty_prefix_lists_nothing_and_a_missing_object_is_an_input_error(store: Store) -> None:
    assert store.list() == []
    assert store.info("x.tar") is None
    assert store.read_if_there("x.tar") is None
    with pytest.raises(InputError, match=r"cannot read .*/x\.tar: not found"):
        store.read("x.tar")


def test_names_are_those_of_the_listing_below_any_folder(store: Store) -> None:
    for name in ("b/c/3.json", "b/2.json", "b.json", "a/1.json"):
        store.put(name, b"{}")
    ours = {name for name in store.names() if "scratch" not in name}
    assert ours == {"b/c/3.json", "b/2.json", "b.json", "a/1.json"}
    assert sorted(store.names("b")) == [entry.name for entry in store.list("b")] == ["b/2.json", "b/c/3.json"]
    assert list(store.names("nowhere")) == []


def test_a_shard_that_is_a_link_opens_as_the_version_that_was_listed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.tar").write_bytes(b"four")
    os.utime(tmp_path / "elsewhere" / "a.tar", (1e9, 1e9))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").symlink_to(tmp_path / "elsewhere" / "a.tar")
    (tmp_path / "in" / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    source, (entry,), passed_over, _ = resolve_input(str(tmp_path / "in"))
    assert (entry.name, entry.size) == ("a.tar", 4)
    assert entry.etag.startswith("4-1000000000000000-")
    assert [(one.key, one.detail) for one in passed_over] == [
        ("loop", "links to folders are not followed"),
        ("lost", "a broken link"),
    ]
    assert source.open_version(entry.name, entry.etag).read() == b"four"
    assert sorted(source.names()) == ["a.tar", "loop", "lost"]


def test_what_a_file_system_keeps_at_its_root_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def refusing(path: str) -> object:
        if os.path.basename(path) in ("lost+found", "shut"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.tar").touch()
    monkeypatch.setattr(os, "scandir", refusing)
    here = Store(str(tmp_path))
    assert [entry.name for entry in here.list()] == list(here.names()) == ["a.tar"]
    (tmp_path / "shut").mkdir()
    with pytest.raises(StoreError, match="cannot list"):
        here.list()


def test_a_file_whose_flush_failed_once_is_there_for_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, [OSError(errno.ETIMEDOUT, "Connection timed out")]

    def failing(fd: int) -> None:
        if left:
            raise left.pop()
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (tmp_path / "made").write_bytes(b"all of it")
    Store(str(tmp_path / "out")).put_file("a.tar", tmp_path / "made")
    assert (tmp_path / "out/a.tar").read_bytes() == b"all of it"


def test_names_are_deleted_once_each_whether_they_are_there_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, deleted = Store(str(tmp_path)), []
    names = [f"{number}" for number in range(50)]
    for name in names:
        here.put(name, b"x")
    real = Store._delete
    monkeypatch.setattr(Store, "_delete", lambda self, name: (real(self, name), deleted.append(name)))
    here.delete(iter([*names, "missing"]))
    assert sorted(deleted) == sorted([*names, "missing"])
    assert list(here.names()) == []
    here.delete([])


@pytest.mark.permissions
def test_a_folder_that_may_not_be_read_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(StoreError, match="cannot list"):
        Store(str(tmp_path)).list()


def test_put_replaces_but_create_never_does(store: Store) -> None:
    assert store.create("one", b"first")
    assert not store.create("one", b"second")
    assert store.read("one") == b"first"
    store.put("one", b"third")
    assert store.read("one") == b"third"
    assert store.honours_create()


def test_only_one_of_eight_racing_creators_wins(store: Store) -> None:
    store.put("warm", b"")
    for turn in range(5):
        wins: list[int] = []
        barrier = threading.Barrier(8)

        def race(me: int, turn: int = turn, wins: list[int] = wins, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if store.create(f"race-{turn}", b"%d" % me):
                wins.append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert store.read(f"race-{turn}") == b"%d" % wins[0]


def test_a_changed_object_is_refused_under_its_planned_version(store: Store) -> None:
    store.put("a.tar", b"before")
    etag = store.list()[0].etag
    store.open_version("a.tar", etag).close()
    time.sleep(0.01)
    store.put("a.tar", b"after!")
    with pytest.raises(InputError, match="changed-input"):
        store.open_version("a.tar", etag)


def test_a_store_travels_to_another_process_as_its_url(store: Store) -> None:
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a") == b"1"


def test_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    store.put("a", b"1")
    store.delete(["a", "b"])
    assert store.list() == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["sub/t-2.tar.gz", "t-0.tar", "t-1.tar"]),
        ("/t-*.tar", ["t-0.tar", "t-1.tar"]),
        ("/t-{0..1}.tar", ["t-0.tar", "t-1.tar"]),
        ("/t-1.tar", ["t-1.tar"]),
    ],
)
def test_a_prefix_a_glob_a_brace_pattern_and_one_shard_are_understood(
    store: Store, pattern: str, expected: list[str]
) -> None:
    for name in ("t-0.tar", "t-1.tar", "sub/t-2.tar.gz", "notes.txt", "_scumble/x.tar"):
        store.put(name, b"x")
    source, entries, *_ = resolve_input(store.url + pattern)
    assert [entry.name for entry in entries] == expected
    assert source.read(entries[0].name) == b"x"


def test_input_without_shards_is_refused_in_one_line_that_says_what_is_there(store: Store) -> None:
    with pytest.raises(InputError, match=r"no shards .*nothing there"):
        resolve_input(store.url)
    store.put("a.txt", b"")
    with pytest.raises(InputError, match=r"no shards .*only 1 other objects"):
        resolve_input(store.url)
    store.put("t-0.tar", b"")
    store.put("t-1.tar", b"")
    with pytest.raises(InputError, match=r"1 of 3 shards are missing, e.g. t-2\.tar"):
        resolve_input(store.url + "/t-{0..2}.tar")


@pytest.mark.s3
def test_a_missing_bucket_is_one_line(s3_server: str) -> None:
    with pytest.raises((InputError, StoreError)) as caught:
        resolve_input("s3://no-such-bucket-anywhere/prefix")
    assert "\n" not in str(caught.value)
    assert "no-such-bucket-anywhere" in str(caught.value)


def test_an_unknown_scheme_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"ftpx://host/a: unknown or missing storage driver"):
        Store("ftpx://host/a")


def _write_for_ever(folder: str) -> None:
    mine = Store(folder)
    for turn in range(10_000):
        mine.put("shard.tar", bytes([turn % 256]) * 3_000_000)


def test_a_writer_killed_at_any_moment_leaves_a_whole_object_or_none(tmp_path: Path) -> None:
    mine = Store(str(tmp_path))
    for delay in (0.05, 0.11, 0.17, 0.23):
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(tmp_path),))
        writer.start()
        while mine.info("shard.tar") is None:
            time.sleep(0.01)
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = mine.read("shard.tar")
        assert len(data) == 3_000_000
        assert len(set(data)) == 1
        mine.delete(["shard.tar"])


def test_what_killed_writers_left_goes_after_an_hour_and_locks_and_files_in_use_stay(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.sweep()  # there is nothing yet
    store.put("one.json", b"1")
    scratch = tmp_path / "_scumble/scratch"
    for name, minutes in (("left", 61), ("in-use", 59), ("held.lock", 1_000)):
        (scratch / name).write_bytes(b"half a shard")
        os.utime(scratch / name, (time.time() - 60 * minutes,) * 2)
    store.sweep()
    assert sorted(path.name for path in scratch.iterdir()) == ["held.lock", "in-use"]
    assert store.read("one.json") == b"1"


def test_a_name_is_flushed_to_disk_with_the_folders_that_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, flushed = Store(str(tmp_path / "out")), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    mine.put("a/b/one.json", b"1")
    assert flushed[0].startswith(f"{tmp_path}/out/_scumble/scratch/")
    assert set(flushed[1:]) == {f"{tmp_path}/out/a/b", f"{tmp_path}/out/a", f"{tmp_path}/out", str(tmp_path)}
    del flushed[:]
    assert mine.create("a/b/two.json", b"2")
    assert flushed[1:] == [f"{tmp_path}/out/a/b"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_filesystem_without_hard_links_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuses(source: str, target: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuses)
    wanted = "has no hard links, which commits need: choose an --output on another one"
    with pytest.raises(StoreError, match=wanted) as caught:
        Store(str(tmp_path)).create("commit.json", b"1")
    assert "credentials" not in str(caught.value)


@pytest.mark.permissions
def test_a_file_that_may_not_be_read_is_not_a_matter_of_credentials(tmp_path: Path) -> None:
    (tmp_path / "a").touch(mode=0)
    with pytest.raises(StoreError, match="Permission denied.*check the owner and permissions") as caught:
        Store(str(tmp_path)).read("a")
    assert not caught.value.may_pass


def answered(status: int, code: str, kind: type[Exception] = OSError) -> Exception:
    """A refusal as it reaches us: translated by s3fs, with botocore's as its cause."""
    error = kind(f"reading /internal/500/connect-timeout.tar: {code}")
    fields = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = ClientError(fields, "GetObject")  # type: ignore[arg-type]
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (answered(503, "SlowDown"), True),
        (answered(500, "InternalError"), True),
        (answered(429, "TooManyRequests"), True),
        (answered(400, "RequestTimeout", TimeoutError), True),
        (answered(409, "ConditionalRequestConflict"), True),
        (answered(403, "AccessDenied", PermissionError), False),
        (answered(403, "InvalidObjectState", PermissionError), False),
        (answered(400, "KeyTooLongError"), False),
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (aiohttp.ClientPayloadError("incomplete"), True),
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (OSError(errno.EAGAIN, "again"), True),
        (OSError(errno.EIO, "500 internal-timeout-connect-503.tar"), False),
        (OSError(errno.ENOSPC, "no room on /reset/unavailable"), False),
    ],
)
def test_types_and_codes_decide_what_is_tried_again_and_never_words(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
