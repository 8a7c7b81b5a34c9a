"""The main job as a user runs it: real command, real shards, and what lies on disk afterwards."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from jobs import protect_imagenet
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.uploads import jpeg

pytestmark = [
    pytest.mark.ray,
    # the webdataset library leaves its files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


SEPARATED = "a\u2028b"  # a key with a line separator that JSON does not escape


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in` and `out` of one undisturbed run."""
    folder = tmp_path_factory.mktemp("quiet")
    runs.write_collection(folder / "in")
    done = runs.protect(str(folder / "in"), str(folder / "out"), "--workers", "2")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def job(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(runs.ROOT / "jobs" / name), *options], capture_output=True, text=True, check=False
    )


def read_back(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a folder, by the webdataset library, undecoded."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in dataset}


def test_every_sample_comes_back_under_its_key_with_its_sidecars_and_a_changed_image(quiet: Path) -> None:
    before, after = read_back(quiet / "in"), read_back(quiet / "out")
    assert list(after) == list(before)
    assert len(after) == 160
    for key, members in before.items():
        assert list(after[key]) == list(members)
        for suffix, data in members.items():
            assert (after[key][suffix] == data) == (suffix in ("cls", "txt"))


def test_files_written_without_loss_stay_within_epsilon_and_use_most_of_it(quiet: Path) -> None:
    before, after = read_back(quiet / "in"), read_back(quiet / "out")
    largest = []
    for key in before:
        if "png" in before[key]:
            old, new = (np.asarray(Image.open(io.BytesIO(s[key]["png"])), np.int16) for s in (before, after))
            assert old.shape == new.shape
            largest.append(int(np.abs(new - old).max()))
    assert max(largest) == 16
    assert min(largest) > 8


def test_the_run_says_what_it_did_and_leaves_a_machine_readable_end(quiet: Path) -> None:
    stdout, stderr = ((quiet / name).read_text() for name in ("stdout", "stderr"))
    assert "protected    160 images in 5 shards" in stdout
    assert re.search(r"stage=apply done=5/5 shard=photos-00\d\.tar images=32 rejected=0 rate=\d+/s eta=0s", stderr)
    assert [line for line in stderr.splitlines() if not line.startswith(("stage=", "warning: "))] == []
    status = json.loads((quiet / "out/_scumble/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    assert status["counts"] == {"shards": 5, "protected": 160, "quarantined": 0}
    report = (quiet / "out/_scumble/report.html").read_text()
    assert "160 images protected" in report


def test_the_same_command_again_computes_nothing(quiet: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (quiet / "out").rglob("*.tar")}
    again = runs.protect(str(quiet / "in"), str(quiet / "out"))
    assert again.returncode == 0, again.stderr
    assert "committed    5 shards, 0 left" in again.stdout
    assert "images=32" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (quiet / "out").rglob("*.tar")} == files


def test_verify_agrees_and_names_shard_and_key_of_what_was_tampered_with(quiet: Path, tmp_path: Path) -> None:
    whole = job("verify.py", "--output", str(quiet / "out"), "--input", str(quiet / "in"), "--decode", "1")
    assert whole.returncode == 0, whole.stdout
    assert "largest change 16 levels in 80 files written without loss" in whole.stdout
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(quiet / "out"), str(copy)], check=True)
    (copy / "photos-003.tar").write_bytes((quiet / "in/photos-003.tar").read_bytes())
    broken = job("verify.py", "--output", str(copy), "--input", str(quiet / "in"))
    assert broken.returncode == 1
    assert re.search(r"problem +photos-003\.tar: SHA-256: found \w{64}, but the record says \w{64}", broken.stdout)
    unprotected = "photos-003.tar key 003/0000: the image is unprotected: its bytes are identical to the input's"
    assert unprotected in broken.stdout


def test_status_counts_from_commits_alone(quiet: Path) -> None:
    found = json.loads(job("status.py", "--output", str(quiet / "out"), "--json").stdout)
    assert (found["shards"], found["images"], found["done"]) == ("5 of 5 committed", 160, True)


def test_other_settings_over_the_same_output_are_refused_with_the_difference(quiet: Path) -> None:
    given = ["--input", str(quiet / "in"), "--output", str(quiet / "out"), *runs.SMALL, "--epsilon", "8/255"]
    code, stderr = runs.refusal(protect_imagenet.main, *given, "--encode", "lossless")
    assert code == 1
    line = stderr.strip()
    assert line.startswith(f"error: {quiet}/out belongs to another run (encode was same, is lossless; epsilon was 0.06")
    assert line.endswith("use its settings to resume it, choose another --output, or add --overwrite")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--input", "nowhere"], 1, "nowhere: no shards"),
        (["--surrogate", "timm:tf_efficientnet_lite9"], 2, "did you mean tf_efficientnet_lite"),
        (["--epsilon", "16"], 2, "--epsilon must be above 0 and at most 127/255"),
        (["--clusters", "161"], 2, "the input has only 160 images; choose fewer clusters"),
        (["--clustres", "4"], 2, "unknown option --clustres; did you mean --clusters"),
        (["--output", "IN/out"], 2, "originals are never overwritten"),
        (["--surrogate", "open_clip:ViT-B-32/openai", "--surrogate-weights", "no.safetensors"], 1, "no.safetensors"),
    ],
)
def test_bad_input_is_one_line_before_any_work(quiet: Path, options: list[str], code: int, message: str) -> None:
    options = [option.replace("IN/", f"{quiet}/in/") for option in options]
    given = ["--input", str(quiet / "in"), "--output", str(quiet / "refused"), *runs.SMALL, *options]
    started = time.monotonic()
    ended, stderr = runs.refusal(protect_imagenet.main, *given)
    assert ended == code, stderr
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert time.monotonic() - started < 30
    assert not (quiet / "refused").exists()


def test_a_dry_run_predicts_and_writes_nothing(quiet: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = job(
        "protect_imagenet.py",
        *("--input", str(quiet / "in"), "--output", str(output), "--dry-run", "--price-per-gpu-hour", "2", *runs.SMALL),
    )
    assert done.returncode == 0, done.stderr
    assert "5 shards" in done.stdout
    predicted = re.search(r"images +about (\d+), median 64x64 pixels", done.stdout)
    assert predicted is not None
    assert int(predicted[1]) == pytest.approx(160, rel=0.05)
    assert re.search(r"cost +about \d", done.stdout)
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.s3
def test_from_bucket_to_bucket_uploads_of_all_kinds_end_in_the_output_or_in_quarantine_with_a_reason(
    bucket: str, native_uploads: Path, tmp_path: Path
) -> None:
    runs.write_collection(tmp_path / "in", shards=1)
    uploads = json.loads((native_uploads / "manifest.json").read_text())["files"]
    with (
        tarfile.open(native_uploads / "native-uploads.tar") as given,
        tarfile.open(tmp_path / "in/uploads.tar", "w") as tar,
    ):
        for number, entry in enumerate(uploads):
            member = given.extractfile(entry["path"])
            assert member is not None
            runs.add(tar, f"upload{number:02d}.{entry['path'].rpartition('.')[2].lower()}", member.read())
        runs.add(tar, f"{SEPARATED}.jpg", jpeg(1)[:300])
    source, output = Store(bucket + "/in"), Store(bucket + "/out")
    for path in (tmp_path / "in").iterdir():
        source.put_file(path.name, path)
    done = runs.protect(source.url, output.url)
    assert done.returncode == 0, done.stderr
    checked = job("verify.py", "--output", output.url, "--input", source.url, "--decode", "1")
    assert checked.returncode == 0, checked.stdout
    files = {entry.name: output.read(entry.name) for entry in output.list()}
    (tmp_path / "uploads.tar").write_bytes(files["uploads.tar"])
    lines = files["_scumble/quarantine/uploads.tar.jsonl"].splitlines()
    refused = {json.loads(line)["key"] for line in lines}
    kept = set(read_back(tmp_path))
    assert json.loads(files["_scumble/commits/uploads.tar.json"])["num_protected"] == len(kept) >= 30
    assert not kept & refused
    assert SEPARATED in refused
    assert len(kept | refused) >= len(uploads) + 1 - 4  # names without a key are refused under their member name
    assert len(kept) + len(lines) == len(uploads) + 1
    assert {json.loads(line)["reason"] for line in lines} >= {"animated", "undecodable", "too-many-pixels", "empty"}
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    if len(secret) > 8:  # the in-process server's key is an ordinary word
        assert not [name for name, data in files.items() if secret in data]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_130_and_one_line_at_every_stage(tmp_path: Path) -> None:
    """At one stage after the other, each of a run that goes on where the one before was stopped."""
    runs.write_collection(tmp_path / "in", shards=3)
    command = runs.command(str(tmp_path / "in"), str(tmp_path / "out"), *runs.SMALL, *runs.ONE_WORKER)
    for moment, reached, ahead in (
        ("ray::MapWorker(MapBatches(Embedder", "run.json", "clustering.safetensors"),
        ("ray::RayTrainWorker", "clustering.safetensors", "protection.safetensors"),
        ("ray::MapWorker(MapBatches(Protector", "protection.safetensors", "gallery.safetensors"),
    ):
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(command, stdout=stderr, stderr=stderr, text=True, start_new_session=True)
            runs.wait_for(functools.partial(is_at_work, process.pid, moment), process)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            assert process.wait(timeout=60) == 130
        said = (tmp_path / "stderr").read_text()
        assert said.splitlines()[-1] == "stopped; run the same command again to resume"
        assert "Traceback" not in said
        assert [(tmp_path / "out/_scumble" / name).exists() for name in (reached, ahead)] == [True, False]
        status = json.loads((tmp_path / "out/_scumble/status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("failed", 130)


def is_at_work(driver: int, role: str) -> bool:
    return bool(runs.named(runs.descendants(driver), role))


@pytest.mark.slow
def test_two_runs_at_once_over_one_output_both_end_well_and_leave_one_truth(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=3, per_shard=16)
    both = [runs.start(str(tmp_path / "in"), str(tmp_path / "out")) for _ in range(2)]
    assert [process.wait(timeout=550) for process in both] == [0, 0]
    assert len(list((tmp_path / "out/_scumble/commits").iterdir())) == len(runs.shard_digests(tmp_path / "out")) == 3
    checked = job("verify.py", "--output", str(tmp_path / "out"), "--input", str(tmp_path / "in"), "--decode", "1")
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_the_papers_way_at_224_pixels_goes_to_the_end_with_its_figures(tmp_path: Path) -> None:
    """A generator network for each cluster, through the surrogate: the preset uc-paper but for its size."""
    runs.write_collection(tmp_path / "in", shards=2, per_shard=16)
    options = [*runs.FEW_STEPS, "--preset", "uc-paper", "--generator", "network", "--batch-size", "4"]
    options += ["--fit-images", "8", "--clusters", "2", "--steps", "2", "--generator-lr", "1e-3", "--workers", "1"]
    done = job("protect_imagenet.py", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    for members in read_back(tmp_path / "out").values():
        assert Image.open(io.BytesIO(members["png"])).size == (224, 224)
    settings = json.loads((tmp_path / "out/_scumble/run.json").read_text())["ingredients"]["settings"]
    assert [settings[name] for name in ("generator", "bound", "size", "generator_lr")] == [
        *("network", "tanh_clamp", "224", 1e-3)
    ]
    report = (tmp_path / "out/_scumble/report.html").read_text()
    assert "one generator network per cluster" in report
    assert re.search(r"<b>\d+ / 255</b><span>largest \|delta\|", report)
    checked = job("verify.py", "--output", str(tmp_path / "out"), "--input", str(tmp_path / "in"), "--decode", "1")
    assert checked.returncode == 0, checked.stdout
