"""pack.py from end to end, in this process: what lands in the shards, again and after kills, and what is left out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import pack
from pipeline import layout
from pipeline.errors import ConflictError
from pipeline.packing.pack import PackCommit
from pipeline.records import read_quarantine
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.packed import about, digests, jpeg, packed, photos, write
from tests.support.samples import image_bytes, noise, read, tar_bytes

IN_NAMES = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # a tar ends names at a zero


def run(source: Path, output: Path, *options: str) -> int:
    return pack.main(["--input", str(source), "--output", str(output), *options])


def test_a_folder_is_packed_to_the_byte_with_its_classes_in_order(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "cab")
    assert run(source, tmp_path / "out", "--shard-images", "5") == 0
    samples = packed(tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [f"shard-00000{n}.tar" for n in range(3)]
    expected = [(f"{name}/deep/{n}", str(label).encode()) for label, name in enumerate("abc") for n in range(4)]
    assert [(one.key, one.members["cls"]) for one in samples] == expected
    for one in samples:
        path = about(one)["path"]
        assert one.members["jpeg"] == (source / str(path)).read_bytes()
        assert about(one) == {"class": one.key[0], "path": f"{one.key}.JPEG"}
    assert (tmp_path / "out" / layout.PACK_CLASSES).read_text() == "a\nb\nc\n"


def test_no_image_is_lost_to_names_that_differ_in_case_format_or_dots(tmp_path: Path) -> None:
    names = [
        "x/a.jpg",
        "x/A.jpg",
        "x/a.JPG",
        "x/a.png",
        "x/a.b.jpg",
        "x/a_b.jpg",
        "x/.hidden.jpg",
        "x/__a.jpg",
        "ü/ä b.jpg",
    ]
    write(tmp_path / "in", {name: jpeg(n) for n, name in enumerate(names)})
    assert run(tmp_path / "in", tmp_path / "out") == 0
    samples = packed(tmp_path / "out")
    assert {about(one)["path"] for one in samples} == set(names)
    assert len({one.key for one in samples}) == len(names)
    assert {one.key for one in samples if "~" not in one.key} == {"x/A", "x/a_b", "x/__a", "ü/ä b"}


def test_what_may_hold_images_and_is_not_packed_is_listed_and_ends_with_3(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "a", 1)
    bad = {
        "a/x.gif": b"GIF89a",
        "a/empty.jpg": b"",
        "a/big.jpg": bytes(3000),
        "a/old.tar": b"x",
        "a/new\nline.jpg": b"x",
    }
    write(source, bad | {"a/notes.txt": b"x", "a/._1.jpg": b"x"})
    (source / "a/link.jpg").symlink_to("deep/0.JPEG")
    (source / "b").symlink_to("a")
    os.mkfifo(source / "a/fifo.png")
    assert run(source, tmp_path / "out", "--max-member-bytes", "2k") == 3
    assert len(packed(tmp_path / "out")) == 1
    listed = {
        one.key: one.reason.value for one in read_quarantine(Store(str(tmp_path / "out")), layout.PACK_PASSED_OVER)
    }
    assert listed == {
        "a/x.gif": "unsupported-format",
        "a/empty.jpg": "empty",
        "a/big.jpg": "too-large",
        "a/old.tar": "unsupported-format",
        "a/new\\x0aline.jpg": "unsafe-name",
        "a/link.jpg": "not-a-file",
        "b": "not-a-file",
        "a/fifo.png": "not-a-file",
    }


def test_a_second_run_and_one_with_other_shuffles(tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        assert run(source, tmp_path / name, "--shuffle", seed, "--shard-images", "5") == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")
    keys = [one.key for one in packed(tmp_path / "one")]
    assert keys != sorted(keys)
    assert sorted(keys) == sorted(one.key for one in packed(tmp_path / "other"))


def test_an_output_of_another_run_is_left_alone(tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    assert run(source, tmp_path / "out") == 0
    before = digests(tmp_path / "out")
    code, said = runs.refusal(pack.main, "--input", str(source), "--output", str(tmp_path / "out"), "--shuffle", "1")
    assert (code, said.count("\n")) == (1, 1)
    assert "(shuffle was None, is 1)" in said or "shuffle was None, is 1" in said
    assert digests(tmp_path / "out") == before
    write(tmp_path / "mine", {"shard-000000.tar": b"mine"})
    code, said = runs.refusal(pack.main, "--input", str(source), "--output", str(tmp_path / "mine"))
    assert (code, said) == (
        1,
        f"error: {tmp_path}/mine holds shard-000000.tar, which no run wrote: choose another --output\n",
    )


def test_a_changed_input_is_never_mixed_in(tmp_path: Path) -> None:
    source = photos(tmp_path / "in")
    assert run(source, tmp_path / "out", "--shard-images", "5") == 0
    (tmp_path / "out" / layout.pack_commit("shard-000001.tar")).unlink()
    (source / "b/deep/1.JPEG").write_bytes(jpeg(999))
    code, said = runs.refusal(
        pack.main, "--input", str(source), "--output", str(tmp_path / "out"), "--shard-images", "5"
    )
    assert (code, said.count("\n")) == (1, 1)
    assert "belongs to another run (plan_sha256 was" in said


def test_two_runs_at_once_commit_a_shard_once_and_notice_if_they_disagree(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    counts = {"num_images": 1, "num_quarantined": 0, "image_bytes": 1, "output_size": 1, "quarantine": {}}
    ours, equal, other = (
        PackCommit(fingerprint="f", shard="s.tar", output_sha256=digest, seconds=seconds, **counts)  # type: ignore[arg-type]
        for digest, seconds in (("a", 1.0), ("a", 2.0), ("b", 1.0))
    )
    ours.created(store)
    equal.created(store)
    with pytest.raises(ConflictError, match="s.tar: committed with SHA-256 a, but made here with b: two runs disagree"):
        other.created(store)
    assert PackCommit.read(store, layout.pack_commit("s.tar")) == ours


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_byte(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "abc", 60)
    assert run(source, tmp_path / "quiet", "--shard-images", "10") == 0
    command = [sys.executable, str(runs.ROOT / "jobs/pack.py"), "--input", str(source), "--shard-images", "10"]
    for left in (1, 9):
        output = tmp_path / f"killed-{left}"
        commits = output / layout.PACK_COMMITS
        with subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL) as process:
            runs.wait_for(lambda commits=commits, left=left: len(list(commits.glob("*"))) >= left, process)
            process.send_signal(signal.SIGKILL)
        kept = {path.name: path.stat().st_mtime_ns for path in commits.glob("*")}
        assert run(source, output, "--shard-images", "10") == 0
        assert digests(output) == digests(tmp_path / "quiet")
        assert all((commits / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        photos(tmp_path / "in" / split, "ab", 2)
    code, said = runs.refusal(pack.main, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    assert (code, said) == (
        1,
        f"error: {tmp_path}/in has the splits train, val, which are no classes: add --split NAME\n",
    )
    assert run(tmp_path / "in", tmp_path / "out", "--split", "val") == 0
    assert [one.key for one in packed(tmp_path / "out")] == ["a/deep/0", "a/deep/1", "b/deep/0", "b/deep/1"]
    assert (tmp_path / "out/val-000000.tar").is_file()
    code, said = runs.refusal(
        pack.main, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "o"), "--split", "test"
    )
    assert (code, said) == (1, f"error: --split test: no such folder in {tmp_path}/in; it has train, val\n")


@pytest.mark.parametrize(
    ("name", "table", "labels"),
    [
        ("t.csv", 'path,label\na/0.jpg,zebra\nb/1.jpg,"ant, red"\n', {"a/0": b"1", "b/1": b"0"}),
        ("t.csv", "id,file_name,class\r\n7,./a/0.jpg,12\r\n8,b/1.jpg,3\r\n", {"a/0": b"12", "b/1": b"3"}),
        (
            "t.jsonl",
            '{"path": "a/0.jpg", "label": 2}\n\n{"file_name": "b/1.jpg", "label": 0}',
            {"a/0": b"2", "b/1": b"0"},
        ),
    ],
)
def test_labels_from_a_table(tmp_path: Path, name: str, table: str, labels: dict[str, bytes]) -> None:
    source = write(tmp_path / "in", {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1), "b/unnamed.jpg": jpeg(2)})
    (tmp_path / name).write_text(table, newline="")
    assert run(source, tmp_path / "out", "--labels", str(tmp_path / name)) == 0
    assert {one.key: one.members["cls"] for one in packed(tmp_path / "out")} == labels


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            "path,label\na/0.jpg,1\na/gone.jpg,2\nb/gone.jpg,2\n",
            "--labels names 2 files that are not in IN, e.g. a/gone.jpg",
        ),
        ("path,label\n../0.jpg,1\n", "line 2: '../0.jpg': the name leaves its prefix"),
        ("path,label\n/etc/passwd,1\n", "line 2: '/etc/passwd': the name is absolute"),
        ("path,label\na/0.jpg,1\n./a/0.jpg,2\n", "line 3: a/0.jpg occurs twice"),
        ("path,label\na/0.jpg\n", "line 2: a path and a label are needed"),
        ("a/0.jpg,1\n", "its first line must name the columns, such as path,label"),
        ('path,label\n"a/0.jpg,1\n', "unexpected end of data"),
        ("path,label\n", "no rows"),
        ("path,label\na/0.jpg,99999999\n", "labels must lie between 0 and 1,000,000"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(tmp_path: Path, table: str, said: str) -> None:
    source = write(tmp_path / "in", {"a/0.jpg": jpeg(0)})
    (tmp_path / "t.csv").write_text(table)
    options = ["--input", str(source), "--output", str(tmp_path / "out"), "--labels", str(tmp_path / "t.csv")]
    code, line = runs.refusal(pack.main, *options)
    assert (code, line.count("\n")) == (1, 1)
    assert said.replace("IN", str(source)) in line
    assert not (tmp_path / "out").exists()


def test_classes_and_samples_are_chosen(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", "abcd", 5)
    assert run(source, tmp_path / "first", "--first-classes", "2") == 0
    assert {(one.key[0], one.members["cls"]) for one in packed(tmp_path / "first")} == {("a", b"0"), ("b", b"1")}
    (tmp_path / "classes.txt").write_text("# mine\nd the last\na\n")
    assert run(source, tmp_path / "named", "--classes", str(tmp_path / "classes.txt")) == 0
    assert {(one.key[0], one.members["cls"]) for one in packed(tmp_path / "named")} == {("d", b"0"), ("a", b"1")}
    for output in ("some", "same"):
        assert run(source, tmp_path / output, "--images", "7") == 0
    assert len(packed(tmp_path / "some")) == 7
    assert digests(tmp_path / "some") == digests(tmp_path / "same")
    (tmp_path / "wrong.txt").write_text("ddd\n")
    options = ["--input", str(source), "--output", str(tmp_path / "o")]
    code, said = runs.refusal(pack.main, *options, "--classes", str(tmp_path / "wrong.txt"))
    assert (code, said.count("\n")) == (2, 1)
    assert runs.refusal(pack.main, *options, "--first-classes", "9") == (
        2,
        "error: --first-classes 9: the input has only 4 classes\n",
    )


def test_shards_are_cut_by_bytes_and_hold_one_image_at_least(tmp_path: Path) -> None:
    files = {f"{n}.png": image_bytes(noise(side, side), "PNG") for n, side in enumerate((8, 8, 99, 8, 8))}
    source = write(tmp_path / "in", files)
    assert run(source, tmp_path / "out", "--shard-bytes", "10k") == 0
    sizes = [len(read(path.read_bytes())) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sizes == [2, 1, 2]


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "in")
    assert run(source, tmp_path / "out", "--dry-run", "--shard-images", "5") == 0
    said = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in source.rglob("*.JPEG"))
    assert said == [
        f"input        {source}: folder, 12 images, {size / 1e6:,.1f} MB",
        "classes      3",
        f"output       {tmp_path}/out: 3 shards",
    ]
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_archives_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.packing.sources._LOOKED_AT", 2)  # the image comes after what tells the format
    inside = [("0.jpg", jpeg(0))]
    files = {"a.tar": tar_bytes(inside), "b.tar": tar_bytes(inside), "c.tar.gz": b"x", "d.zip": b"x", "e.jpg": jpeg(1)}
    source = write(tmp_path / "in", files | {"f.cr2": b"x", "g.jpg_large": b"x", "notes.txt": b"x"})
    (source / "h.tar").symlink_to(tmp_path / "nowhere")
    assert run(source, tmp_path / "out") == 3
    said = capsys.readouterr()
    refused = read_quarantine(Store(str(tmp_path / "out")), layout.PACK_PASSED_OVER)
    assert {one.key: one.reason.value for one in refused} == dict.fromkeys(
        ("c.tar.gz", "d.zip", "e.jpg", "f.cr2", "g.jpg_large"), "unsupported-format"
    ) | {"h.tar": "not-a-file"}
    assert "other files  1 are not packed, e.g. notes.txt" in said.out + said.err


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(IN_NAMES, min_size=1, max_size=12), max_size=6, unique=True))
def test_every_image_is_packed_under_a_key_of_its_own_or_listed(names: list[str]) -> None:
    import tempfile

    from pipeline.packing.archives import TarSource
    from pipeline.packing.plan import plan_pack
    from pipeline.packing.settings import PackSettings

    members: list[tuple[str | tarfile.TarInfo, bytes]] = [(f"{name}.png", b"x") for name in names] + [("ok.png", b"x")]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"a.tar": tar_bytes(members, format=tarfile.PAX_FORMAT)})
        store = Store(folder)
        plan = plan_pack(TarSource(store, tuple(store.list())), PackSettings(input=folder))
    keys = plan.rows["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    assert len(keys) + len(plan.left.rejections) + sum("._" in name for name in names) >= len(members)
    assert all("." not in key.rpartition("/")[2] and key.rpartition("/")[2] for key in keys)
