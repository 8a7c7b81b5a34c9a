"""A folder of pictures as a user has it: the commands of the README, and a run that is killed on the way."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import pack
from pipeline.relearning.collection import Collection, load_labelled
from pipeline.relearning.labels.given import class_numbers
from pipeline.shards.inputs import resolve_input
from tests.faults.kills import Campaign
from tests.support import runs
from tests.support.uploads import small_protection

BROKEN = "broken.JPG"


def pictures(folder: Path, count: int) -> Path:
    """Real patches in nested folders, extensions in either case, labels beside them; one file is no image."""
    runs.write_collection(folder.parent / "shards", shards=1, per_shard=count)
    with tarfile.open(folder.parent / "shards/photos-000.tar") as tar:
        tar.extractall(folder, filter="data")
    for path in sorted(folder.rglob("*2.jpg")):
        path.rename(path.with_suffix(".JPG"))
    (folder / BROKEN).write_bytes(b"no image")
    (folder / "notes.md").write_bytes(b"# notes")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the records of a run."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("_scumble/")}


def of_the_readme(command: str) -> list[str]:
    """The commands of the quick start for a folder of pictures, for this machine."""
    start = (runs.ROOT / "README.md").read_text().partition("**On one GPU machine with a folder of pictures.**")[2]
    lines = re.findall(r"^```\n(.*?)^```$", start, re.MULTILINE | re.DOTALL)[0].splitlines()
    (line,) = (line for line in lines if command in line and "--dry-run" not in line)
    return shlex.split(line.replace("--gpus-per-worker 1", "").replace("jobs/", f"{runs.ROOT}/jobs/"))[1:]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, `test`, and `protected`, which the command of the README made of `photos`."""
    folder = tmp_path_factory.mktemp("folder")
    before = pictures(folder / "unsorted", 72)
    by_class(before, folder / "photos", 0, 48), by_class(before, folder / "test", 48, 24)
    for name in (BROKEN, "notes.md"):
        shutil.copy(before / name, folder / "photos")
    # smoothed features would cluster what is fitted on by its neighbours, and what comes later by itself
    options = [*runs.SMALL, *runs.ONE_WORKER, "--cluster-space", "features"]
    done = run(folder, *of_the_readme("protect_imagenet.py"), *options)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    again = run(folder, *of_the_readme("protect_imagenet.py"), *options)
    assert again.returncode == 0, again.stderr
    assert "committed    4 shards, 0 left" in again.stdout
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_the_commands_of_the_readme_protect_a_folder_and_keep_its_names(protected: Path) -> None:
    said = (protected / "stdout").read_text()
    assert "photos/: 49 loose images in 4 units, " in said
    assert "not copied   1 files that are no images and no sidecars: notes.md" in said
    assert "protected    48 images in 4 shards" in said
    before, after = files(protected / "photos"), files(protected / "protected")
    assert set(after) == set(before) - {BROKEN, "notes.md"}
    for name, data in after.items():
        if name.endswith((".cls", ".txt")):
            assert data == before[name]
            continue
        ours, theirs = (Image.open(io.BytesIO(one)) for one in (data, before[name]))
        assert (ours.format, ours.size, ours.mode) == (theirs.format, theirs.size, theirs.mode)
        change = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max()
        assert 0 < change <= 16 or ours.format == "JPEG"
    checked = run(protected, *of_the_readme("verify.py"), "--decode", "1")
    assert checked.returncode == 0, checked.stdout
    assert "samples      48 counted, 48 decoded" in checked.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_a_folder_that_begins_with_a_unit_of_broken_pictures_is_protected_to_the_end(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 24)
    for number in range(40):
        (source / f"{number:02d}.png").write_bytes(b"no image")  # before all others, in units of their own
    done = runs.protect(str(source), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "protected    24 images in 5 shards" in done.stdout
    assert "quarantined  41 samples" in done.stdout
    checked = run(tmp_path, str(runs.ROOT / "jobs/verify.py"), "--output", "out", "--input", "in")
    assert checked.returncode == 0, checked.stdout


def by_class(source: Path, folder: Path, first: int, count: int) -> None:
    """Some of the pictures of `pictures` and their captions, each in the folder of its class."""
    pictured = [path for path in sorted((source / "000").iterdir()) if path.suffix.lower() in (".jpg", ".png")]
    for path in pictured[first : first + count]:
        deep = folder / f"class {path.with_suffix('.cls').read_text()}/deep"
        deep.mkdir(parents=True, exist_ok=True)
        for one in (path, path.with_suffix(".txt")):
            shutil.copy(one, deep)


def loaded(folder: Path) -> Collection:
    """What an evaluation loads of a collection, by key."""
    store, shards, *_ = resolve_input(str(folder))
    found = load_labelled(store, shards, side=64, classes=class_numbers({"": shards}))
    return found.rows(np.argsort(found.keys))


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_and_the_same_pictures_in_shards_are_protected_and_evaluated_alike(protected: Path) -> None:
    (protected / "photos" / BROKEN).unlink()  # whose samples in shards and in a folder have other names
    for name in ("photos", "test"):
        assert pack.main(["--input", str(protected / name), "--output", str(protected / f"{name}-packed")]) == 0
    job, fitted = str(runs.ROOT / "jobs/protect_imagenet.py"), "_scumble/protection.safetensors"
    names = ["--input", "photos-packed", "--output", "protected-packed", "--protection", f"protected/{fitted}"]
    done = run(protected, job, *runs.small(*names, *runs.ONE_WORKER))
    assert done.returncode == 0, done.stderr
    copied = (protected / "protected-packed" / fitted).read_bytes()
    assert copied == (protected / "protected" / fitted).read_bytes()
    checked = run(protected, f"{runs.ROOT}/jobs/verify.py", "--output", "protected-packed", "--input", "photos-packed")
    assert checked.returncode == 0, checked.stdout
    for name in ("photos", "test", "protected"):  # equal collections are equal trials: see the key of a trial
        ours, theirs = (loaded(protected / f"{name}{kind}") for kind in ("", "-packed"))
        assert len(ours) == (24 if name == "test" else 48)
        assert ours.digest() == theirs.digest()
    job = str(runs.ROOT / "jobs/evaluate_relearning.py")
    urls = ["--clean", "photos", "--test", "test", "--protected", "uc=protected", "--output", "evaluated"]
    options = ["--preset", "smoke", "--regimes", "nt", "--epochs", "2", "--workers", "1", "--images", "40"]
    done = run(protected, job, *urls, *options)
    assert done.returncode == 0, done.stderr
    assert "labels       the first folder of every image: 4 classes" in done.stdout
    rows = pq.read_table(protected / "evaluated/results.parquet").to_pylist()
    (count,) = {row["num_train"] for row in rows}  # of about 40 in each arm, the same
    assert 32 <= count <= 40
    assert {(row["protection"], row["num_test"]) for row in rows} == {("clean", 24), ("uc", 24)}
    (own,) = [row["accuracy_own_delta"] for row in rows if row["protection"] == "uc"]
    assert 0 <= own <= 1


UNITS = [f"images-{number:07d}" for number in range(3)]
POINTS = (
    *("after create _scumble/run.json", f"before create _scumble/features/{UNITS[1]}.parquet"),
    *("before put_file 000/0003.png", "after put_file 000/0020.jpg", f"before create _scumble/commits/{UNITS[2]}.json"),
    f"after create _scumble/commits/{UNITS[0]}.json",
)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_run_over_a_folder_that_is_killed_again_and_again_ends_with_the_bytes_of_a_quiet_one(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 40)
    (tmp_path / "protection.safetensors").write_bytes(small_protection().to_bytes())
    options = ("--protection", str(tmp_path / "protection.safetensors"))
    done = runs.protect(str(source), str(tmp_path / "quiet"), *options)
    assert done.returncode == 0, done.stderr
    campaign = Campaign(source, tmp_path / "out", tmp_path / "tokens", named=POINTS, random=[], options=options)
    campaign.run()
    assert not campaign.left, "points that no process came by"
    assert files(tmp_path / "out") == files(tmp_path / "quiet")
    for name in ("run.json", "plan.parquet", "protection.safetensors", f"quarantine/{UNITS[2]}.jsonl"):
        ours, quiet = (tmp_path / output / "_scumble" / name for output in ("out", "quiet"))
        assert ours.read_bytes() == quiet.read_bytes(), name
    checked = run(tmp_path, f"{runs.ROOT}/jobs/verify.py", "--output", "out", "--input", "in", "--decode", "1")
    assert checked.returncode == 0, checked.stdout
