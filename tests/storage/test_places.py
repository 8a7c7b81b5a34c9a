"""An output that is the input by whatever name is refused, and nothing was written or deleted to find that out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import doctor
from pipeline.errors import SettingsError
from pipeline.storage import places
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store
from tests.support.faulty_server import FaultyServer, _Handler


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of one shard in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.tar").write_bytes(b"original")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(source: str, output: str, shards: list[str] | None = None) -> None:
    with pytest.raises(SettingsError) as caught:
        check_apart(Store(source), Store(output), shards or [])
    assert "overwrite" not in str(caught.value)


@pytest.mark.parametrize("inside", ["", "/sub", "/new", "/sub/new/deeper"])
def test_a_link_to_the_input_or_into_it_is_the_input(photos: Path, tmp_path: Path, inside: str) -> None:
    (tmp_path / "safe").symlink_to(f"{photos}{inside}")
    (tmp_path / "again").symlink_to("safe")
    for output in ("safe", "again", "safe/protected", "again/../photos", "./photos/../again"):
        refused(str(photos), f"{tmp_path}/{output}")
    refused(f"{tmp_path}/again/.." if not inside else str(photos), str(photos))


@pytest.mark.parametrize(("output", "named"), [("a.txt", "a.txt"), ("a.txt/new/deeper", "a.txt"), ("gone/new", "gone")])
def test_an_output_where_no_folder_can_be_made_is_refused(
    photos: Path, tmp_path: Path, output: str, named: str
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a letter")
    (tmp_path / "gone").symlink_to(tmp_path / "no such folder")
    with pytest.raises(SettingsError) as caught:
        check_apart(Store(str(photos)), Store(f"{tmp_path}/{output}"))
    assert str(caught.value) == f"--output {tmp_path}/{output}: {tmp_path}/{named} is not a folder; " + (
        "choose another --output"
    )
    assert (tmp_path / "a.txt").read_bytes() == b"a letter"


def test_every_spelling_of_a_path_is_the_path(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    for output in (
        f"file://{photos}",
        f"local://{photos}/out",
        "photos/",
        "photos/sub/../../photos",
        "photos//sub",
        ".",
    ):
        refused(str(photos), output)
        refused(output, f"file://{photos}")


def test_an_input_that_is_reached_through_a_link_lies_in_the_output(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(photos / "sub")
    refused(str(tmp_path / "source"), str(photos))
    check_apart(Store(str(tmp_path / "source")), Store(str(photos)), may_hold=True)
    with pytest.raises(SettingsError, match="overlap"):
        check_apart(Store(str(photos)), Store(str(tmp_path / "source" / "x")), may_hold=True)


def test_neighbours_with_a_common_beginning_are_no_overlap(photos: Path, tmp_path: Path) -> None:
    check_apart(Store(str(photos)), Store(f"{photos}-protected"), ["sub/a.tar"])
    check_apart(Store("s3://b/raw"), Store("s3://b/raw-protected"))
    check_apart(Store("s3://b/raw"), Store(f"{tmp_path}/b/raw"))


@pytest.mark.parametrize(("source", "output"), [("b/x/", "b/x"), ("b", "b/out"), ("b/a/b", "b/a")])
def test_prefixes_of_a_bucket_overlap_under_both_schemes(source: str, output: str) -> None:
    refused(f"s3://{source}", f"s3a://{output}")


@pytest.mark.parametrize(
    ("output", "hits"),
    [
        ("/mnt/same", True),
        ("/mnt/part/new", True),
        ("/mnt/other", False),
        ("/mnt/above/set", True),
        ("/mnt/photo s", True),
    ],
)
def test_a_folder_mounted_elsewhere_is_told_by_its_place_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, hits: bool
) -> None:
    rows = [("8:1", "/", "/"), ("8:2", "/", "/data"), ("8:2", "/set/photos", "/mnt/same")]
    rows += [
        ("8:2", "/set/photos/sub", "/mnt/part"),
        ("8:2", "/set/photos-2", "/mnt/other"),
        ("8:2", "/", "/mnt/above"),
    ]
    rows += [("8:2", "/set/photos/sub", "/mnt/photo\\040s")]
    table = "".join(f"{n} 1 {device} {root} {at} rw - ext4 x rw\n" for n, (device, root, at) in enumerate(rows))
    (tmp_path / "mountinfo").write_text(table)
    monkeypatch.setattr(places, "_MOUNTS", tmp_path / "mountinfo")
    if hits:
        refused("/data/set/photos", output)
    else:
        check_apart(Store("/data/set/photos"), Store(output))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_bind_mount_of_the_input_is_the_input(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "safe").mkdir()
    if os.system(f"mount --bind {photos}/sub {tmp_path}/safe 2>/dev/null"):
        pytest.skip("this machine does not let us mount")
    try:
        refused(str(photos), f"{tmp_path}/safe")
        refused(str(photos), f"{tmp_path}/safe/new")
    finally:
        os.system(f"umount {tmp_path}/safe")


def test_links_between_two_places_that_are_apart_are_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "kept").mkdir(parents=True)
    (out / "kept" / "b.tar").write_bytes(b"original")
    (photos / "b.tar").symlink_to(out / "kept" / "b.tar")
    refused(str(photos), str(out), ["sub/a.tar", "b.tar"])
    (photos / "b.tar").unlink()
    (out / "sub").symlink_to(photos / "sub")
    refused(str(photos), str(out), ["sub/a.tar"])
    with pytest.raises(SettingsError, match="remove that link"):
        Store(str(out)).put("sub/a.tar", b"protected")
    assert (photos / "sub" / "a.tar").read_bytes() == b"original"


def test_the_doctor_says_so_and_leaves_no_probe(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.inspection.checkup.check_space", lambda *_: [])
    monkeypatch.setattr("jobs.inspection.checkup._cluster", lambda *_: [])
    (tmp_path / "safe").symlink_to(photos)
    before = tree(photos)
    assert doctor.main(["--input", str(photos), "--output", str(tmp_path / "safe")]) == 1
    assert "error    output       --output" in capsys.readouterr().out
    assert tree(photos) == before
    assert not (photos / "_scumble").exists()


@pytest.fixture
def alias(
    lenient_s3: None, bucket: str, s3_server: str, s3_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Another name of the bucket, as access points have."""
    forward = _Handler.do_GET

    def renamed(self: _Handler) -> None:
        self.path = self.path.replace("/another-name", f"/{bucket.removeprefix('s3://')}", 1)
        forward(self)

    server = FaultyServer(s3_server)
    for method in ("do_GET", "do_HEAD", "do_PUT", "do_DELETE"):
        monkeypatch.setattr(_Handler, method, renamed)
    s3_at(server.url)
    yield "s3://another-name"
    server.close()


def test_another_name_of_the_bucket_is_the_bucket(bucket: str, alias: str) -> None:
    Store(bucket).put("raw/a.tar", b"original")
    for output in ("/raw", "/raw/out", ""):
        refused(f"{bucket}/raw", f"{alias}{output}")
    check_apart(Store(f"{bucket}/raw"), Store(f"{alias}/safe"))
    check_apart(Store(f"{bucket}/raw"), Store("s3://there-is-no-such-bucket/raw"))
    assert [entry.name for entry in Store(bucket).list()] == ["raw/a.tar"]
