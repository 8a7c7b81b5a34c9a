"""One for All as a user runs it: trained by one command, laid over another collection by the main job."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import protect_imagenet, train_one_for_all
from jobs.protection.options import parse_settings
from jobs.protection.prepare import prepare
from pipeline.deltas.load import load_protection
from pipeline.deltas.universal.generator import UniversalGenerator
from pipeline.errors import InputError, SettingsError
from tests.support import runs

pytestmark = pytest.mark.ray
SMALL = [
    *("--surrogate", "timm:tf_efficientnet_lite0", "--surrogate-size", "64"),
    *("--side", "64", "--width", "2", "--blocks", "1", "--batch-size", "16", "--max-steps", "8", "--lr", "1e-2"),
]


def train(folder: Path, *more: str) -> list[str]:
    job = str(runs.ROOT / "jobs/train_one_for_all.py")
    return [
        sys.executable,
        job,
        "--input",
        str(folder / "train"),
        "--output",
        str(folder / "u.safetensors"),
        *SMALL,
        *more,
    ]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-for-all")
    runs.write_collection(folder / "train", shards=2, per_shard=24)
    runs.write_collection(folder / "other", shards=2, per_shard=12, side=50)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> subprocess.CompletedProcess[str]:
    return run(train(data))


@pytest.fixture(scope="module")
def protected(data: Path, trained) -> subprocess.CompletedProcess[str]:
    assert trained.returncode == 0, trained.stderr
    command = runs.command(
        str(data / "other"), str(data / "protected"), "--method", "one-for-all", "--encode", "lossless"
    )
    more = ["--protection", str(data / "u.safetensors"), "--surrogate", SMALL[1], "--surrogate-size", "64"]
    return run([*command, *more])


def test_the_command_leaves_a_protection_and_a_page(data: Path, trained) -> None:
    assert trained.returncode == 0, trained.stderr
    protection = load_protection((data / "u.safetensors").read_bytes())
    assert protection.figures["steps"] == 8
    assert "cosine" in trained.stdout
    assert "Cosine to the opposite concept" in (data / "u.html").read_text()
    assert not [*data.glob("*.checkpoint"), *data.glob("*.progress.json")]


def test_a_dry_run_says_steps_memory_and_time_and_writes_nothing(data: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    options = train(tmp_path, "--dry-run", "--epochs", "2", "--max-steps", "100")[2:]
    assert train_one_for_all.main(options) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["images"] == "about 48 of 48, at 73 px"
    assert lines["steps"].startswith("6 of 16 images")  # two passes over three batches
    parameters = sum(each.numel() for each in UniversalGenerator(1280, width=2, blocks=1).parameters())
    assert lines["memory"].startswith(f"{48 * 3 * 73 * 73 / 1e3:.1f} kB of images in each worker, and once for all; ")
    assert f"{16 * parameters / 1e6:.1f} MB for generator and optimiser" in lines["memory"]
    assert lines["time"].startswith("about ")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    with pytest.raises(InputError, match="about 48 images are fewer than --batch-size 64"):
        train_one_for_all.main([*options, "--batch-size", "64"])
    for more, words in (
        (("--workers", "3"), "--batch-size 16 cannot be divided among 3 workers"),
        (("--near", "5000"), "--near 5000: the bank has only"),
    ):
        with pytest.raises(SettingsError, match=words):
            train_one_for_all.main([*options, *more])


def test_the_same_command_again_trains_nothing(data: Path, trained) -> None:
    before = (data / "u.safetensors").stat().st_mtime_ns
    again = run(train(data))
    assert again.returncode == 0
    assert "trained      already; nothing to do" in again.stdout
    assert (data / "u.safetensors").stat().st_mtime_ns == before
    other = run(train(data, "--seed", "1"))
    assert other.returncode == 1
    assert "holds another protection" in other.stderr


def test_every_image_of_another_collection_moves_within_epsilon(data: Path, protected) -> None:
    assert protected.returncode == 0, protected.stderr
    largest = []
    for path in sorted((data / "other").glob("*.tar")):
        with tarfile.open(path) as before, tarfile.open(data / "protected" / path.name) as after:
            ours = {name.rpartition(".")[0]: name for name in after.getnames() if name.endswith((".png", ".jpg"))}
            for name in before.getnames():
                if name.endswith((".png", ".jpg")):
                    one = pixels(before, name)
                    other = pixels(after, ours[name.rpartition(".")[0]])
                    assert one.shape == other.shape
                    largest.append(np.abs(one - other).max())
                else:
                    assert before.extractfile(name).read() == after.extractfile(name).read()  # type: ignore[union-attr]
    assert len(largest) == 24
    assert 0 < max(largest) <= 8


def pixels(tar: tarfile.TarFile, name: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(tar.extractfile(name).read())).convert("RGB")).astype(int)  # type: ignore[union-attr]


def test_verify_and_report_know_the_method(data: Path, protected) -> None:
    job = str(runs.ROOT / "jobs/verify.py")
    verified = run([sys.executable, job, "--output", str(data / "protected"), "--input", str(data / "other")])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "One for All" in (data / "protected/_scumble/report.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "one-for-all"], "add --protection FILE"),
        (["--method", "uc", "--protection", "u.safetensors"], "was made with method one-for-all: omit --method"),
    ],
)
def test_a_generator_and_its_method_belong_together(data: Path, trained, more, words) -> None:
    given = ["--input", str(data / "other"), "--output", str(data / "refused"), *SMALL[:4]]
    more = [word.replace("u.safetensors", str(data / "u.safetensors")) for word in more]
    code, stderr = runs.refusal(protect_imagenet.main, *given, *more)
    assert code == 2
    assert words in stderr
    assert not (data / "refused").exists()


def test_the_file_alone_says_method_and_surrogate(data: Path, trained) -> None:
    given = ["--input", str(data / "other"), "--output", str(data / "planned")]
    run = prepare(parse_settings([*given, "--protection", str(data / "u.safetensors")]))
    assert run.settings.method == "one-for-all"
    assert run.given is not None
    assert run.surrogate.id == run.given.surrogate_id


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bytes(data: Path, trained, tmp_path: Path) -> None:
    assert trained.returncode == 0, trained.stderr
    command = [*train(data), "--output", str(tmp_path / "killed.safetensors"), "--checkpoint-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    runs.wait_for(lambda: bool(list(tmp_path.glob("killed*.checkpoint"))), process)  # type: ignore[arg-type]
    runs.kill_tree(process)  # type: ignore[arg-type]
    assert not (tmp_path / "killed.safetensors").exists()
    assert run(command).returncode == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (data / "u.safetensors").read_bytes()
