"""Shards as they are written: in order, to the byte, the same in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.records import Sample
from pipeline.shards.tar import ShardWriter, header, split_name
from tests.support.samples import read

WRITTEN = [
    Sample("dir/z first", {"png": b"\x89PNG", "cls": b"7", "a.json": b"{}", "JPG.txt": b""}),
    Sample("アルバム/été 🏖", {"jpg": b"J" * 1000, "_meta": b"m"}),
    Sample("long/" + "n" * 180 + "/" + "é" * 90, {"webp": b"W", "txt": b"t" * 512}),
]


def write(path: Path, samples: list[Sample], compressed: bool = False) -> ShardWriter:
    with ShardWriter(path, compressed=compressed) as writer:
        for sample in samples:
            writer.write(sample)
    return writer


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_written_is_read_back_in_the_same_order(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("out.tar.gz" if compressed else "out.tar")
    writer = write(path, WRITTEN, compressed)
    assert read(path.read_bytes()) == WRITTEN
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{s.key}.{name}" for s in WRITTEN for name in s.members]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert writer.num_members == 8
    assert writer.size == path.stat().st_size
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore")  # of webdataset's own reader
@pytest.mark.parametrize("name", ["out.tar", "out.tar.gz"])
def test_webdataset_reads_our_shards_to_the_byte(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, WRITTEN, name.endswith("gz"))
    found = list(webdataset.WebDataset(str(tmp_path / name), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in WRITTEN]
    for ours, theirs in zip(WRITTEN, found, strict=True):
        members = {name: data for name, data in theirs.items() if not name.startswith("__")}
        assert members == {name.lower(): data for name, data in ours.members.items()}


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from pipeline.shards.tar import ShardWriter; from pipeline.records import Sample\n"
        "w = ShardWriter(Path(sys.argv[1]), compressed=True)\n"
        "w.write(Sample('k', {'jpg': b'x' * 5000, 'cls': b'1'})); w.close(); print(w.sha256)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / str(seed))],
            env={"PYTHONHASHSEED": str(seed), "TZ": "Asia/Tokyo"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(digests) == 1


def test_a_failed_block_leaves_no_digest(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out.tar", compressed=False)
    with pytest.raises(KeyError), writer:
        raise KeyError
    assert writer.sha256 == ""


@pytest.mark.parametrize("name", ["a.jpg", "folder/b.c.json", "x" * 96 + ".jpg", "x" * 97 + ".jpg", "ü/é.png"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 70_000])
def test_members_are_written_byte_for_byte_as_by_webdataset_and_tarfile(tmp_path: Path, name: str, size: int) -> None:
    key, suffix = split_name(name)
    data = bytes(index % 251 for index in range(size))
    written = write(tmp_path / "ours.tar", [Sample(key, {suffix: data})])
    with (tmp_path / "theirs.tar").open("wb") as file:
        sink = webdataset.TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0)
        sink.tarstream.format = tarfile.GNU_FORMAT  # its own choice is not passed on
        sink.write({"__key__": key, suffix: data})
        sink.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert written.size == (tmp_path / "ours.tar").stat().st_size


def test_a_size_that_needs_more_than_eleven_octal_digits_is_written_as_tarfile_does() -> None:
    for size in ((1 << 33) - 1, 1 << 33):
        info = tarfile.TarInfo("a.jpg")
        info.size = size
        assert header("a.jpg", size) == info.tobuf(tarfile.GNU_FORMAT)
