"""Whatever is replaced, damaged or fails meanwhile: what is whole is protected once, and nothing else is published."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import SettingsError, StoreError
from pipeline.storage.store import Store
from tests.support.faulty_server import FaultyServer
from tests.support.samples import image_bytes
from tests.support.uploads import Job, check_all, jpeg, patch, photos, upload


def test_a_file_replaced_while_it_is_read_is_left_for_the_next_run_and_never_a_mix(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(job.source, photos(3))
    real, replaced = Store.read_if, []

    def replaces(self: Store, name: str, etag: str) -> bytes | None:
        if name == "01.jpg" and not replaced:
            replaced.append(name)
            upload(job.source, {name: jpeg(40)}, age_s=60)
        return real(self, name, etag)

    monkeypatch.setattr(Store, "read_if", replaces)
    assert job.run() == 0
    assert job.outputs().keys() == {"00.jpg", "02.jpg"}
    assert (job.last()["unsettled"], job.last()["protected"]) == (1, 2)
    assert job.run() == 0
    check_all(job, set(photos(3)))
    alone = job.outputs()["01.jpg"]
    again = Job(Path(job.source.root).parent, source=job.source, output=Store(job.output.url + "2"), monkeypatch=None)
    again.protection.write_bytes(job.protection.read_bytes())
    assert again.run() == 0
    assert again.outputs()["01.jpg"] == alone


def test_a_file_that_grows_while_it_is_read_is_no_version(tmp_path: Path) -> None:
    from pipeline.storage import folder

    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(1000))
    os.utime(path, (1, 1))
    etags: list[str] = []

    def etag_of(found: folder.Found) -> str:
        etags.append(str(found))
        if len(etags) == 1:
            with path.open("ab") as more:
                more.write(b"x")
        return f"{path.stat().st_size}-{path.stat().st_mtime}"

    assert folder.read_settled(str(path), "1000-1.0", etag_of) is None


def test_a_shard_replaced_while_it_is_read_is_left_for_the_next_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.samples import tar_bytes

    upload(job.source, {"t.tar": tar_bytes([("a.jpg", jpeg(1))])})
    real = Store.open_version

    def replaces(self: Store, name: str, etag: str) -> object:
        stream = real(self, name, etag)
        upload(job.source, {name: tar_bytes([("a.jpg", jpeg(2)), ("b.jpg", jpeg(3))])}, age_s=60)
        return stream

    monkeypatch.setattr(Store, "open_version", replaces)
    assert job.run() == 0
    assert (job.outputs(), job.last()["unsettled"]) == ({}, 1)
    monkeypatch.setattr(Store, "open_version", real)
    assert job.run() == 0
    assert job.rows()["t.tar"].protected == 2


def test_objects_that_cannot_be_read_are_left_for_the_next_run_and_said(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(job.source, photos(6))
    real = Store.read_if

    def fails(self: Store, name: str, etag: str) -> bytes | None:
        if name == "01.jpg":
            raise StoreError("cannot read in/01.jpg: access denied")
        return real(self, name, etag)

    monkeypatch.setattr(Store, "read_if", fails)
    assert job.run() == 1
    assert (
        "1 objects could not be read and are left for the next run; first 01.jpg: cannot read"
        in capsys.readouterr().err
    )
    assert (job.last()["protected"], job.last()["failed_names"]) == (5, ["01.jpg"])
    monkeypatch.setattr(Store, "read_if", real)
    assert job.run() == 0
    check_all(job, set(photos(6)))


def test_a_store_that_gives_nothing_ends_the_run_in_one_line(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(job.source, photos(40))

    def fails(self: Store, name: str, etag: str) -> bytes | None:
        failure = StoreError(f"cannot read in/{name}: 503 Slow Down")
        failure.may_pass = True
        raise failure

    monkeypatch.setattr(Store, "read_if", fails)
    with pytest.raises(StoreError, match="5 units in a row could not be read: cannot read in/"):
        job.run()
    assert (job.last()["state"], job.last()["exit_code"]) == ("failed", 1)


@pytest.mark.usefixtures("lenient_s3")
def test_archived_objects_are_left_and_named_as_the_store_says_and_all_behind_them_is_done(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Store(f"{bucket}/in")
    for number in range(70):
        place = {"Bucket": bucket.removeprefix("s3://"), "Key": f"in/2019/{number:03d}.jpg"}
        source.filesystem.call_s3("put_object", **place, Body=jpeg(1), StorageClass="GLACIER")
    upload(source, {f"2026/{number:03d}.jpg": jpeg(number) for number in range(5)})
    job = Job(tmp_path, source=source, output=Store(str(tmp_path / "out")), monkeypatch=monkeypatch)
    assert job.run() == 1
    assert (job.last()["protected"], job.last()["failed"], len(job.last()["failed_names"])) == (5, 70, 20)
    said = capsys.readouterr().err
    assert "70 objects could not be read and are left for the next run; first 2019/000.jpg: cannot read" in said
    assert "InvalidObjectState" in said
    assert "the object is archived: restore it" in said
    assert "credentials" not in said


@pytest.mark.parametrize("how", ["moved", "copied over", "written over"])
def test_a_file_replaced_by_one_of_equal_size_and_time_is_protected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job = Job(tmp_path, source=Store(f"{tmp_path}/in"), output=Store(f"{tmp_path}/out"), monkeypatch=monkeypatch)
    (tmp_path / "in").mkdir()
    for name, number in (("old.png", 1), ("new.png", 2)):
        (tmp_path / name).write_bytes(image_bytes(patch(number), "PNG", compress_level=0))
        os.utime(tmp_path / name, (1e9, 1e9))
    assert (tmp_path / "old.png").stat().st_size == (tmp_path / "new.png").stat().st_size
    target = tmp_path / "in" / "p.png"
    shutil.copy2(tmp_path / "old.png", target)
    assert job.run() == 0
    before = job.outputs()["p.png"]
    assert job.run() == 0
    assert (job.last()["known"], job.last()["changed"]) == (1, 0)
    if how == "moved":
        os.replace(tmp_path / "new.png", target)
    elif how == "copied over":
        shutil.copy2(tmp_path / "new.png", target)
    else:
        target.write_bytes((tmp_path / "new.png").read_bytes())
        os.utime(target, (1e9, 1e9))
    assert job.run() == 0
    assert job.last()["changed"] == 1
    assert job.outputs()["p.png"] != before


def test_a_damaged_shard_is_named_with_its_place_and_ends_the_run_with_3(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import verify
    from tests.support.samples import tar_bytes

    whole = tar_bytes([(f"{number}.jpg", jpeg(number)) for number in range(5)])
    upload(job.source, {"t.tar": whole[: len(whole) // 2], "u.tar": whole + whole[:0], "._t.tar": b"Mac"})
    assert job.run() == 3
    said = capsys.readouterr().err
    assert "warning: not in the output: t.tar: the shard ends at byte" in said
    assert "bytes missing" in said
    assert job.last()["lost"][0].startswith("t.tar: ")
    assert job.rows()["u.tar"].protected == 5
    assert 1 <= job.rows()["t.tar"].protected < 5
    arguments = ["--output", job.output.url, "--input", job.source.url]
    assert verify.main(arguments) == 3
    assert "not in the output: t.tar: the shard ends" in capsys.readouterr().err


def test_an_output_that_is_a_link_into_the_input_is_refused_and_nothing_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Store(str(tmp_path / "photos"))
    upload(source, {"p.jpg": jpeg(1)})
    (tmp_path / "photos" / "protected").mkdir()
    (tmp_path / "safe").symlink_to("photos/protected")
    job = Job(tmp_path, source=source, output=Store(str(tmp_path / "safe")), monkeypatch=monkeypatch)
    for options in ((), ("--dry-run",)):
        with pytest.raises(SettingsError, match="overlap"):
            job.run(*options)
    assert [path.name for path in (tmp_path / "photos").rglob("*")] == ["protected", "p.jpg"]


def test_the_first_image_is_committed_before_the_last_is_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(job.source, photos(50))
    real, events = Store.read_if, []

    def notes(self: Store, name: str, etag: str) -> bytes | None:
        events.append((name, len(self_commits())))
        return real(self, name, etag)

    def self_commits() -> list[object]:
        return list(Path(job.output.root).glob("_scumble/uploads/commits/*.json"))

    monkeypatch.setattr(Store, "read_if", notes)
    assert job.run() == 0
    assert len(events) == 50
    assert events[0] == ("00.jpg", 0)
    assert all(commits >= 1 for _, commits in events[1:])
    assert events[-1][1] >= 5


@pytest.fixture
def faulty(s3_server: str, s3_at: Callable[[str], None]) -> Iterator[FaultyServer]:
    proxy = FaultyServer(s3_server, lambda count: {5: 503, 11: 500, 17: 1}.get(count % 23, 0))
    s3_at(proxy.url)
    yield proxy
    proxy.close()


@pytest.mark.s3
def test_a_store_that_answers_500_and_503_and_slowly_costs_time_only(remote: Job, faulty: FaultyServer) -> None:
    upload(remote.source, photos(4) | {"bad.jpg": b""})
    assert remote.run() == 0
    assert remote.run() == 0
    assert faulty.faults >= 5
    assert remote.last()["known"] == 5
    assert remote.outputs().keys() == set(photos(4))
    assert remote.rows()["bad.jpg"].reason == "empty"


@pytest.mark.slow
def test_a_hundred_thousand_uploads_of_which_five_are_new(job: Job) -> None:
    data, root = jpeg(1), Path(job.source.root)
    for folder in range(100):
        (root / f"{folder:02d} ü %+").mkdir()
        for number in range(1000):
            path = root / f"{folder:02d} ü %+" / f"{number:04d}.jpg"
            path.write_bytes(b"")
            os.utime(path, (1, 1))
    assert job.run("--unit-images", "5000") == 0
    assert job.last()["quarantined"] == 100_000
    for number in range(5):
        upload(job.source, {f"50 ü %+/new {number}.jpg": data})
    started = time.monotonic()
    assert job.run() == 0
    assert time.monotonic() - started < 60
    assert (job.last()["protected"], job.last()["known"]) == (5, 100_000)
    assert len(job.outputs()) == 5
