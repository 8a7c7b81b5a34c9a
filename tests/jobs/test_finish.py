"""How a run ends over an input of which a part is lost or not read, and over one that must not be touched."""

from __future__ import annotations

import gzip
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from jobs import protect_imagenet, verify
from actors.cluster.batches import RunContext
from actors.protector import Protector
from jobs.protection.finish import finish_run
from jobs.protection.options import parse_settings
from jobs.protection.prepare import prepare, start_run
from jobs.protection.status_file import StatusFile
from pipeline import layout
from pipeline.errors import ConflictError, SettingsError
from pipeline.records import Sample
from pipeline.shards.tar import read_samples
from pipeline.surrogates.features import Assignment, assignment_to_parquet
from tests.support import runs
from tests.support.samples import image_bytes, noise
from tests.support.uploads import SURROGATE, small_protection


def arguments(source: Path, output: Path, *options: str) -> list[str]:
    given = ["--input", str(source), "--output", str(output), "--surrogate", SURROGATE, "--surrogate-size", "64"]
    protection = output.parent / "protection.safetensors"
    protection.write_bytes(small_protection().to_bytes())
    return [*given, "--protection", str(protection), "--max-quarantine", "0.5", *options]


def run_through(given: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The job's exit code and what it says, with the one stage that matters done here instead of in Ray."""
    run = prepare(parse_settings(given))
    print(run.summary)
    start_run(run)
    run.output.put(layout.PROTECTION, small_protection().to_bytes())
    context = RunContext(run.source, run.output, run.settings, run.plan.fingerprint, threads=1, device="cpu")
    for shard in run.plan.shards:
        with run.source.open(shard.name) as stream:
            found = read_samples(stream, max_member_bytes=1 << 20)
            keys = tuple(sample.key for sample in found if isinstance(sample, Sample))
        nearest = Assignment(shard.name, keys, np.zeros(len(keys), np.int32), np.zeros(len(keys), np.float32))
        run.output.put(layout.assignment(shard.name), assignment_to_parquet(nearest))
        Protector(context)._protect(shard)
    code = finish_run(run, StatusFile(run.output, run.plan.fingerprint))
    return code, *capsys.readouterr()


def test_what_of_an_input_is_lost_or_not_read_is_named_and_never_exit_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    runs.write_collection(source, shards=5, per_shard=6)
    parts = [(source / f"photos-00{number}.tar").read_bytes() for number in range(5)]
    (source / "photos-001.tar").write_bytes(parts[1] + parts[2])  # joined
    (source / "photos-002.tar").write_bytes(parts[3][: len(parts[3]) // 2])
    (source / "photos-003.tar").unlink()
    (source / "photos-004.tar").rename(source / "PHOTOS-4.TAR")
    (source / "packed.tgz").write_bytes(gzip.compress(parts[4]))
    code, said, _ = run_through(arguments(source, output, "--output", str(tmp_path / "whole")), capsys)
    assert (code, "passed over" in said) == (3, False)  # one shard is cut

    (source / "b.tar.bz2").write_bytes(b"BZh")
    (source / "part2").symlink_to(tmp_path)
    os.mkfifo(source / "p.tar")
    code, said, warned = run_through(arguments(source, output), capsys)
    assert code == 3
    assert "3 not read: b.tar.bz2 (repack it as .tar or .tar.gz), p.tar (a fifo, a socket or a device), part2" in said
    lost = [line.split()[5] for line in warned.splitlines() if line.startswith("warning: not in the output: ")]
    assert lost == ["b.tar.bz2:", "p.tar:", "part2:", "photos-002.tar:"]
    assert "photos-002.tar: the shard ends at byte" in warned
    images = {}
    for path in output.glob("*.*"):
        with path.open("rb") as stream:
            images[path.name] = sum(isinstance(one, Sample) for one in read_samples(stream, max_member_bytes=1 << 20))
    assert images.pop("photos-002.tar") in range(1, 6)
    assert images == {"PHOTOS-4.TAR": 6, "packed.tgz": 6, "photos-000.tar": 6, "photos-001.tar": 12}
    assert (output / "packed.tgz").read_bytes()[:2] == b"\x1f\x8b"
    report = (output / layout.REPORT).read_text()
    assert "b.tar.bz2: repack it as" in report
    assert "photos-002.tar: the shard ends at byte" in report
    assert verify.main(["--output", str(output), "--input", str(source)]) == 3
    assert "not in the output: photos-002.tar" in capsys.readouterr().err

    for name in ("b.tar.bz2", "part2", "p.tar"):
        (source / name).unlink()
    assert prepare(parse_settings(arguments(source, output))).plan.left == ()  # what is not read is not in the listing
    _, _, warned = run_through(arguments(source, output), capsys)
    assert "b.tar.bz2" not in warned


def test_an_output_that_is_a_link_to_the_input_is_refused_with_overwrite_too(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=2)
    (tmp_path / "safe").symlink_to("in")
    before = runs.shard_digests(tmp_path / "in")
    for options in ((), ("--overwrite",), ("--dry-run",)):
        with pytest.raises(SettingsError, match="overlap") as caught:
            protect_imagenet.main(arguments(tmp_path / "in", tmp_path / "safe", *options))
        assert "--overwrite" not in str(caught.value)
    shutil.copytree(tmp_path / "in", tmp_path / "copy")  # stands for an alias that nobody can see through
    with pytest.raises(ConflictError, match="no run of Scumble wrote: choose another --output$"):
        protect_imagenet.main(arguments(tmp_path / "in", tmp_path / "copy", "--overwrite"))
    assert runs.shard_digests(tmp_path / "copy") == runs.shard_digests(tmp_path / "in") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "in", "protection.safetensors", "safe"]


@pytest.mark.parametrize(
    ("job", "source", "options"),
    [
        ("pack", "pictures", ["--input"]),
        ("unpack", "in", ["--format", "folder", "--input"]),
        ("evaluate_relearning", "in", ["--dry-run", "--preset", "smoke", "--test", "test", "--clean"]),
        ("evaluate_relearning", "in", ["--dry-run", "--preset", "smoke", "--clean", "test", "--test"]),
        ("train_one_for_all", "in", ["--surrogate", SURROGATE, "--input"]),
        ("protect_uploads", "in", ["--protection", "protection.safetensors", "--input"]),
    ],
)
def test_no_job_writes_through_a_link_to_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, source: str, options: list[str]
) -> None:
    for name in ("in", "test"):
        runs.write_collection(tmp_path / name, shards=1, per_shard=4)
    (tmp_path / "pictures/a").mkdir(parents=True)
    (tmp_path / "pictures/a/1.png").write_bytes(image_bytes(noise(32, 32)))
    (tmp_path / "protection.safetensors").write_bytes(small_protection().to_bytes())
    (tmp_path / "safe").symlink_to(source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    output = "safe/universal.safetensors" if job == "train_one_for_all" else "safe"
    code, said = runs.refusal(import_module(f"jobs.{job}").main, *options, source, "--output", output)
    assert code == 2
    assert "overlap: originals are never overwritten; choose another --output" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
