"""An input URL means what is there; what of it is not read is counted and named, and nothing is opened to find out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.errors import InputError, SettingsError
from pipeline.records import Rejection
from pipeline.shards.inputs import Listing, resolve_input, said_of, told_of_others, without_unwritable
from pipeline.storage import folder
from pipeline.storage.store import Store


def names(found: Listing) -> list[str]:
    return [entry.name for entry in found.shards]


def passed_over(found: list[Rejection]) -> dict[str, str]:
    return {one.key: one.reason.value for one in found}


def put(store: Store, *objects: str) -> None:
    for name in objects:
        if store.is_local:
            path = Path(store.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        else:
            store.put(name, b"x")


def test_a_kept_sidecar_may_have_the_ending_of_any_picture_or_archive(store: Store) -> None:
    put(store, "a.jpg", "a.depth.exr", "a.SEG.pgm", "a.masks.zip", "a.other.exr")
    found = resolve_input(store.url, ("depth.exr", "seg.pgm", "masks.zip"))
    assert set(found.names) == {"a.jpg", "a.depth.exr", "a.SEG.pgm", "a.masks.zip"}
    assert passed_over(found.passed_over) == {"a.other.exr": "unsupported-format"}


def test_tars_and_images_are_known_in_any_case_and_other_archives_and_formats_are_named(store: Store) -> None:
    put(
        store, "a.tar", "UPPER.TAR", "g.tgz", "G.Tar.Gz", "._a.tar", "sub/x.json", "a.tar.idx", "a.tar.md5", "a.parquet"
    )
    others = [
        "b.tar.bz2",
        "c.tar.zst",
        "d.tar.xz",
        "e.TBZ2",
        "f.tar.lz4",
        "h.zip",
        "i.tar.001",
        "k.tar.gz.part",
        "l.gif",
    ]
    put(
        store,
        *others,
        "m/n.HEIC",
        "l.jpg",
        "m/l.PNG",
        "o.txz",
        "p.tzst",
        "q.tar.Z",
        "_scumble/r.tar",
        "readme.txt",
        "s.json.gz",
    )
    found = resolve_input(store.url)
    assert names(found) == ["G.Tar.Gz", "UPPER.TAR", "a.tar", "g.tgz", "images-0000000"]
    assert [image.files[0].name for image in found.shards[-1].images] == ["l.jpg", "m/l.PNG"]
    assert set(passed_over(found.passed_over)) == {*others, "m/n.HEIC", "o.txz", "p.tzst", "q.tar.Z"}
    others = ["a.parquet", "a.tar.idx", "a.tar.md5", "readme.txt", "s.json.gz", "sub/x.json"]
    assert found.others == others
    assert told_of_others(others) == (
        "6 files that are no images and no sidecars: a.parquet, a.tar.idx, a.tar.md5, readme.txt, s.json.gz, …"
    )
    assert said_of(found.passed_over).startswith("13 not read: b.tar.bz2 (repack it as .tar or .tar.gz), ")
    assert said_of(found.passed_over).endswith(", …")
    assert said_of([]) == ""


@pytest.mark.parametrize(
    "name",
    [
        *("a.hif", "a.HEICS", "a.avifs", "a.apng", "a.jfi", "a.j2k", "a.jpx", "a.dng", "a.CR2", "a.nef", "a.psd"),
        *("a.ppm", "a.tga", "a.dds", "a.jpg_large", "a.jpg:orig", "a.jpg?width=800", "a.png.gz", "a.jpeg.crdownload"),
    ],
)
def test_pictures_of_kinds_that_are_not_read_are_named_as_such(store: Store, name: str) -> None:
    put(store, "x.tar", name, "a.jpg.txt", "a.jpg_large.json", "notes.md", ".DS_Store")
    found = resolve_input(store.url)
    assert passed_over(found.passed_over) == {name: "unsupported-format"}
    assert ".DS_Store" not in found.others


def test_fifos_sockets_links_to_folders_and_to_nowhere_are_passed_over_and_never_opened(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "in"))
    put(store, "a.tar")
    put(Store(str(tmp_path / "elsewhere")), "b.tar")
    os.mkfifo(tmp_path / "in" / "p.tar")
    (tmp_path / "in" / "part2").symlink_to("../elsewhere")
    (tmp_path / "in" / "lost.tar").symlink_to("nowhere")
    (tmp_path / "in" / "fifo.tar").symlink_to("p.tar")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "in" / "s.tar"))
        found = resolve_input(str(tmp_path / "in"))
    assert names(found) == ["a.tar"]
    assert passed_over(found.passed_over) == dict.fromkeys(
        ["fifo.tar", "lost.tar", "p.tar", "part2", "s.tar"], "not-a-file"
    )
    found = resolve_input(f"{tmp_path}/in/*.tar")
    assert (names(found), sorted(passed_over(found.passed_over))) == (
        ["a.tar"],
        ["fifo.tar", "lost.tar", "p.tar", "s.tar"],
    )
    with pytest.raises(InputError, match=r"p\.tar \(a fifo, a socket or a device\)"):
        resolve_input(f"{tmp_path}/in/p.tar")
    entry = found.shards[0]
    (tmp_path / "in" / "a.tar").unlink()
    os.mkfifo(tmp_path / "in" / "a.tar")  # after it was listed
    assert store.read_if(entry.name, entry.etag) is None
    with pytest.raises(InputError, match="changed-input"):
        store.open_version(entry.name, entry.etag)


@pytest.mark.parametrize("called", ["set [2023]", "set{1}", "what?", "a*b", "x.tar", "{", "[", "set {1..3}/[x]"])
def test_a_folder_that_is_there_is_a_folder_whatever_its_name(store: Store, called: str) -> None:
    put(store, f"{called}/t-0.tar", f"{called}/t-1.tar", "set 2/t-0.tar", "set1/t-9.tar")
    url = f"{store.url}/{called}"
    assert names(resolve_input(url)) == names(resolve_input(url + "/")) == ["t-0.tar", "t-1.tar"]
    assert names(resolve_input(url + "/t-*.tar")) == ["t-0.tar", "t-1.tar"]
    assert names(resolve_input(url + "/t-{0..1}.tar")) == ["t-0.tar", "t-1.tar"]
    assert names(resolve_input(url + "/t-1.tar")) == ["t-1.tar"]
    assert resolve_input(url + "/*").store.read("t-0.tar") == b"x"


def test_a_shard_that_is_there_is_no_pattern(store: Store) -> None:
    put(store, "a[1].tar", "a1.tar", "b{1,2}.tar")
    assert names(resolve_input(f"{store.url}/a[1].tar")) == ["a[1].tar"]
    assert names(resolve_input(f"{store.url}/b{{1,2}}.tar")) == ["b{1,2}.tar"]
    assert names(resolve_input(f"{store.url}/a[0-9].tar")) == ["a1.tar"]


def test_a_relative_pattern_begins_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(Store(str(tmp_path)), "t-0.tar", "sub/t-1.tar")
    monkeypatch.chdir(tmp_path)
    assert names(resolve_input("*.tar")) == ["t-0.tar"]
    assert names(resolve_input("sub/*")) == ["t-1.tar"]
    with pytest.raises(InputError, match="bucket name cannot be a pattern"):
        resolve_input("s3://b*/x")


def test_keys_that_no_folder_could_hold_are_left_out_and_said(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/raw")
    keys = ["a.tar", "/a.tar", "x//b.tar", "a.tar/f.tar"]
    for key in keys:
        store.filesystem.call_s3("put_object", Bucket=bucket[5:], Key=f"raw/{key}", Body=b"x")
    found = resolve_input(store.url)
    assert names(found) == ["a.tar", "a.tar/f.tar"]
    assert passed_over(found.passed_over) == dict.fromkeys(["/a.tar", "x//b.tar"], "unsafe-name")
    fitting = without_unwritable(found, Store(str(tmp_path / "out")), layout.assignment)
    assert names(fitting) == ["a.tar"]
    assert fitting.passed_over[-1].detail == "in the output: a.tar is a shard, not a folder"
    assert names(without_unwritable(found, Store(f"{bucket}/out"), layout.assignment)) == ["a.tar", "a.tar/f.tar"]


def test_names_that_are_not_utf8_are_left_out_and_can_be_shown(tmp_path: Path) -> None:
    put(Store(str(tmp_path / "in")), "a.tar", "caf\udce9.tar")
    found = resolve_input(str(tmp_path / "in"))
    assert (names(found), passed_over(found.passed_over)) == (["a.tar"], {"caf\\udce9.tar": "unusable-name"})
    with pytest.raises(InputError, match=r"'in\\udce9': the name is not UTF-8"):
        Store("in\udce9")


def test_names_that_grow_too_long_are_left_out_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Store(str(tmp_path / "not" / "there" / "yet"))
    long = [f"{'x' * length}.tar" for length in (243, 244, 249, 251)]  # .parquet makes them 255, 256 …
    put(Store(str(tmp_path / "in")), *long, "é" * 122 + ".tar")
    found = without_unwritable(resolve_input(str(tmp_path / "in")), output, layout.assignment)
    assert names(found) == [long[0]]
    assert all("bytes exceeds the limit of 255" in one.detail for one in found.passed_over)
    for shard in names(found):
        output.put(layout.assignment(shard), b"")
        output.put(layout.quarantine(shard), b"")
    monkeypatch.setattr(folder, "longest", lambda _: (143, 4095))  # as encrypted home folders have it
    with pytest.raises(InputError, match="none of its shards can be written"):
        without_unwritable(resolve_input(str(tmp_path / "in")), Store(str(tmp_path / "out")), layout.assignment)
    assert "exceeds the limit of 4,095" in Store(str(tmp_path)).too_long("d/" * 2100 + "a.tar")
    assert Store("s3://bucket/p").too_long("d/" * 500 + "a.tar") == ""
    assert "exceeds the limit of 1,024" in Store("s3://bucket/p").too_long("d/" * 512 + "a.tar")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp//x", "127.0.0.1"])
def test_an_endpoint_without_its_scheme_is_one_line_of_usage(
    monkeypatch: pytest.MonkeyPatch, s3_at: Callable[[str], None], endpoint: str
) -> None:
    s3_at(endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(SettingsError, match=f"Invalid endpoint: {endpoint}.*http:// or https://") as caught:
        resolve_input("s3://bkt/x")
    assert "\n" not in str(caught.value)
