"""Files are read once a shard however images are shuffled, and unpacking overwrites nothing."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs import pack, unpack
from pipeline import layout
from pipeline.errors import Reason
from pipeline.records import read_quarantine
from pipeline.storage.store import Store
from tests.packing.test_sources import cifar, hugging_face
from tests.support import runs
from tests.support.packed import jpeg, packed, write
from tests.support.samples import tar_bytes

LABELLED = [("0.jpg", jpeg(0)), ("0.cls", b"0")]


def source_of(kind: str, folder: Path) -> list[str]:
    """Twelve images in two files, and the options to pack them."""
    if kind == "cifar":
        cifar(folder)
    for number in range(2):
        pictures = [jpeg(10 * number + n) for n in range(6)]
        if kind == "parquet":
            rows = [(picture, n % 3) for n, picture in enumerate(pictures)]
            hugging_face(folder / f"data/train-0000{number}-of-00002.parquet", rows, ["a", "b", "c"])
        elif kind == "tar":
            members = [(f"{number}/{n}.jpg", picture) for n, picture in enumerate(pictures)]
            write(folder, {f"{number}.tar": tar_bytes(members)})
    return ["--input", str(folder), *([] if kind == "tar" else ["--split", "train"])]


def contents_of(folder: Path) -> dict[str, dict[str, bytes]]:
    return {one.key: dict(one.members) for one in packed(folder)}


@pytest.mark.parametrize("kind", ["cifar", "parquet", "tar"])
def test_each_file_is_read_once_a_shard_however_its_images_are_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = source_of(kind, tmp_path / "in")
    opened: list[str] = []
    open_version = Store.open_version

    def counted(store: Store, name: str, etag: str) -> Any:
        opened.append(name)
        return open_version(store, name, etag)

    monkeypatch.setattr(Store, "open_version", counted)
    assert pack.main([*options, "--output", str(tmp_path / "plain")]) == 0
    in_order = sorted(opened)
    opened.clear()
    assert pack.main([*options, "--output", str(tmp_path / "mixed"), "--shuffle", "3"]) == 0
    assert sorted(opened) == in_order
    files = [one.key.rpartition("-" if kind == "cifar" else "/")[0] for one in packed(tmp_path / "mixed")]
    assert len(files) == 12
    if kind == "cifar":  # one file holds all classes, so what tells files apart is the end of the folder
        files = [name.rpartition("/")[2] for name in files]
    assert sum(one != other for one, other in pairwise(files)) > 2, "this order would not tell"
    assert contents_of(tmp_path / "mixed") == contents_of(tmp_path / "plain")


def test_two_shards_that_would_become_one_parquet_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.tar": tar_bytes(LABELLED), "a.TAR.GZ": gzip.compress(tar_bytes(LABELLED))})
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--format", "parquet"]
    code, said = runs.refusal(unpack.main, *options)
    assert code == 1
    assert "a.TAR.GZ and a.tar would both become a.parquet: unpack them apart" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "form"), [("x.tar.y/b.parquet", "parquet"), ("a.parquet", "parquet"), ("labels.csv", "folder")]
)
def test_files_of_others_in_the_output_are_not_overwritten(tmp_path: Path, held: str, form: str) -> None:
    write(tmp_path / "in", {"a.tar": tar_bytes(LABELLED), "x.tar.y/b.tar": tar_bytes(LABELLED)})
    write(tmp_path / "out", {held: b"another's"})
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--format", form]
    code, said = runs.refusal(unpack.main, *options)
    assert code == 1
    assert f"holds {held}, which no run wrote: choose another --output" in said
    assert (tmp_path / "out" / held).read_bytes() == b"another's"


def test_a_file_without_a_name_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.tar": tar_bytes([("", jpeg(0)), ("b.jpg", jpeg(1))])})
    assert pack.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 3
    (rejection,) = read_quarantine(Store(str(tmp_path / "out")), layout.PACK_PASSED_OVER)
    assert rejection.reason == Reason.UNUSABLE_NAME
