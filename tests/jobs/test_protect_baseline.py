"""A published method through the same run as our own: labels, deltas, commits, verification."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jobs import protect_baseline, protect_imagenet, verify
from actors.baselines.fitter import BaselineTask, write_deltas
from actors.baselines.labeller import Labeller
from actors.cluster.batches import RunContext, shard_rows
from actors.protector import Protector
from actors.sampler import FitImageReader, cluster_sizes
from jobs.baselines.options import parse_baseline
from jobs.baselines.steps import prepare_baseline, take_given, true_classes
from jobs.protection.finish import finish_run
from jobs.protection.prepare import Run, start_run
from jobs.protection.status_file import StatusFile
from pipeline import layout
from pipeline.baselines.labels import label_clustering
from pipeline.deltas.load import load_protection
from pipeline.errors import InputError, PromiseError
from pipeline.records import Sample
from pipeline.shards.tar import read_samples
from tests.support import runs
from tests.support.samples import image_bytes, noise

CLASSES = 4  # of write_collection


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "in"
    runs.write_collection(folder, shards=3, per_shard=16, side=32)
    return folder


def batch(shard: object) -> dict[str, list[object]]:
    (row,) = shard_rows([shard])  # type: ignore[list-item]
    return {name: [value] for name, value in row.items()}


def protected(
    source: Path,
    output: Path,
    *options: str,
    order: Sequence[int] = (0, 1, 2),
    also: tuple[int, ...] = (),
    told: Callable[[float], None] = lambda share: None,
) -> Run:
    """A run as the job does it, stage by stage, without Ray; shards in any order.

    also  labels that are said to occur, and do not
    told  the progress of the fit
    """
    given = ["--input", str(source), "--output", str(output), "--encode", "lossless", *options]
    settings = parse_baseline(given)
    run = prepare_baseline(settings)
    settings = run.settings
    start_run(run)
    context = RunContext(run.source, run.output, settings, run.plan.fingerprint, threads=1, device="cpu")
    shards = [run.plan.shards[index] for index in order]
    for shard in shards:
        Labeller(context, true_classes(run))(batch(shard))
    if settings.deltas:
        take_given(run, label_clustering(1))
    else:
        read = FitImageReader(context, 32, dict.fromkeys(range(CLASSES), 1.0), whole=True)
        tables = [pa.table({name: list(column) for name, column in read(batch(shard)).items()}) for shard in shards]
        labels = tuple(cluster_sizes(run.output, [shard.name for shard in shards]))
        task = BaselineTask(context, settings, label_clustering(CLASSES), run.surrogate.id, [], None, 32, labels + also)
        write_deltas(task, tables, "cpu", told)
    for shard in shards:
        Protector(context)(batch(shard))
    assert finish_run(run, StatusFile(run.output, run.plan.fingerprint)) == 0
    return run


def pixels(folder: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Label and pixels of every sample of a folder, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in read_samples(io.BytesIO(path.read_bytes()), max_member_bytes=1 << 20):
            assert isinstance(sample, Sample)
            (image,) = (data for suffix, data in sample.members.items() if suffix not in ("cls", "txt"))
            label = int(sample.members["cls"])
            found[sample.key] = label, np.asarray(Image.open(io.BytesIO(image)), np.int16)
    return found


def laid(before: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The change of a picture by levels [3, H, W]: grey ones get the mean of the channels."""
    wanted = np.rint(levels.mean(0)) if before.ndim == 2 else levels.transpose(1, 2, 0)
    return np.clip(before + wanted, 0, 255) - before


def differences(source: Path, output: Path) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Label, original and change of every sample of a protected copy, by key."""
    before, after = pixels(source), pixels(output)
    assert list(before) == list(after)
    return {key: (before[key][0], before[key][1], after[key][1] - before[key][1]) for key in before}


def verified(source: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert verify.main(["--output", str(output), "--input", str(source), "--decode", "1"]) == 0
    return capsys.readouterr().out


def test_every_picture_of_a_class_gets_the_delta_of_that_class(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = protected(source, tmp_path / "out", "--method", "random", "--epsilon", "8/255")
    levels = load_protection(run.output.read(layout.PROTECTION)).levels  # type: ignore[attr-defined]
    assert levels.shape == (CLASSES, 3, 32, 32)
    for key, (label, before, change) in differences(source, tmp_path / "out").items():
        assert (change == laid(before, levels[label])).all(), key
    assert "largest change 8 levels in 48 files" in verified(source, tmp_path / "out", capsys)
    report = run.output.read(layout.REPORT).decode()
    assert "Baseline random (class-wise random noise: P5 of Tao et al." in report
    assert "one delta per label, by true labels" in report


def test_pictures_in_class_folders_are_labelled_by_their_folders(tmp_path: Path) -> None:
    for name in ("cats/1", "cats/deep/2", "dogs/1", "dogs/3"):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(noise(32, 32, seed=len(name)) // 2 + 64))
    run = protected(tmp_path / "in", tmp_path / "out", "--method", "random", order=(0,))
    levels = load_protection(run.output.read(layout.PROTECTION)).levels  # type: ignore[attr-defined]
    for path in (tmp_path / "in").rglob("*.png"):
        after = tmp_path / "out" / path.relative_to(tmp_path / "in")
        before, change = (np.asarray(Image.open(each), np.int16) for each in (path, after))
        label = ["cats", "dogs"].index(path.relative_to(tmp_path / "in").parts[0])
        assert (change - before == levels[label].transpose(1, 2, 0)).all(), path
    (tmp_path / "in/stray.png").write_bytes(image_bytes(noise(32, 32)))
    with pytest.raises(InputError, match=r"stray\.png has no label: put it into the folder of its class"):
        protected(tmp_path / "in", tmp_path / "refused", "--method", "random", order=(0,))


def test_a_label_without_a_picture_to_compute_its_delta_on_ends_the_run(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PromiseError, match="label 9 has no picture to compute a delta on"):
        protected(source, tmp_path / "out", "--method", "random", also=(9,))


def test_deltas_of_single_images_are_kept_by_key_and_are_the_same_whatever_comes_first(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = protected(source, tmp_path / "one", "--method", "sp")
    assert sorted(run.output.names(layout.DELTAS)) == [
        layout.keyed_deltas(f"photos-00{number}.tar") for number in range(3)
    ]
    protected(source, tmp_path / "two", "--method", "sp", order=(2, 0, 1))
    assert runs.shard_digests(tmp_path / "one") == runs.shard_digests(tmp_path / "two")
    seen = [change for _, _, change in differences(source, tmp_path / "one").values()]
    assert len({change.tobytes() for change in seen}) == len(seen)
    assert "in 48 files written without loss" in verified(source, tmp_path / "one", capsys)
    settings = json.loads(run.output.read(layout.RUN))["ingredients"]["settings"]
    assert (settings["epsilon"], settings["method"], settings["labels"]) == (1.0, "sp", "true")
    largest = max(int(np.abs(change).max()) for change in seen)
    protection = load_protection(run.output.read(layout.PROTECTION))
    assert 6 < largest <= round(protection.epsilon * 255) < 20  # what came out, and what holds for every file
    assert "one delta per image, by true labels; bounded in L2 norm" in run.output.read(layout.REPORT).decode()


@pytest.mark.parametrize("method", ["em", "em-class"])
def test_a_method_that_trains_a_network_takes_the_one_that_is_named_and_keeps_its_figures(
    source: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", method, "--network", "small", "--effort", "0.05", "--epsilon", "8/255"]
    run = protected(source, tmp_path / "out", *given)
    assert re.search(r"largest change [1-8] levels in 48 files", verified(source, tmp_path / "out", capsys))
    protection = load_protection(run.output.read(layout.PROTECTION))
    assert protection.per_sample == (method == "em")
    assert protection.figures["fit"]


def test_a_fit_that_is_stopped_goes_on_from_its_checkpoint_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.baselines.trained.checkpoints.SECONDS", 0.0)
    given = ["--method", "em", "--network", "small", "--effort", "0.1"]
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if len(shares) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protected(source, tmp_path / "stopped", *given, told=stop)
    assert (tmp_path / "stopped" / layout.BASELINE_CHECKPOINT).exists()
    again: list[float] = []
    protected(source, tmp_path / "stopped", *given, told=again.append)
    protected(source, tmp_path / "quiet", *given)
    assert again[0] == shares[-1], "it began before or after the last checkpoint"
    assert runs.shard_digests(tmp_path / "stopped") == runs.shard_digests(tmp_path / "quiet")
    assert not (tmp_path / "stopped" / layout.BASELINE_CHECKPOINT).exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
def test_deltas_of_anybody_are_laid_by_key(
    source: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, keys = np.random.default_rng(0), list(pixels(source))
    given = {key: rng.integers(-5, 6, (3, 32, 32)).astype(np.int8) for key in keys}
    path = tmp_path / ("deltas" if kind == "folder" else f"deltas.{kind}")
    if kind == "npz":
        np.savez(path, **given)
    elif kind == "safetensors":
        save_file(given, path)
    else:
        for key, levels in given.items():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{key}.npy", levels)
    protected(source, tmp_path / "out", "--deltas", str(path), "--epsilon", "5/255")
    for key, (_, before, change) in differences(source, tmp_path / "out").items():
        assert (change == laid(before, given[key])).all(), key
    assert "largest change 5 levels" in verified(source, tmp_path / "out", capsys)


def test_an_image_for_which_no_delta_is_given_ends_the_run_before_anything_is_published(
    source: Path, tmp_path: Path
) -> None:
    given = {key: np.ones((3, 8, 8), np.int8) for key in pixels(source)}
    given.pop("001/0003")
    np.savez(tmp_path / "deltas.npz", **given)
    with pytest.raises(InputError, match=r"1 of 16 images of photos-001\.tar have no delta, e\.g\. 001/0003"):
        protected(source, tmp_path / "out", "--deltas", str(tmp_path / "deltas.npz"))
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("levels", "epsilon", "message"),
    [
        (
            np.full((3, 8, 8), 31, np.int16),
            "16/255",
            "has 31 levels, --epsilon allows 16: give the true bound, --epsilon 31/255",
        ),
        (
            np.full((3, 8, 8), 200, np.int16),
            "16/255",
            "has 200 levels, --epsilon allows 16: give the true bound, --epsilon 255/255",
        ),
        (np.zeros((3, 8, 8), np.float32), "16/255", "is float32 (3, 8, 8); deltas are whole 8-bit levels"),
        (
            np.zeros((8, 8, 3), np.int8),
            "16/255",
            "is int8 (8, 8, 3); deltas are whole 8-bit levels, integers [3, H, W]",
        ),
        (
            np.zeros((3, 8, 8), np.int8),
            "16/255",
            "the delta of a/1 is 0 everywhere: the image would be left unprotected",
        ),
        (np.array([{}, 1], object), "16/255", "cannot be read: Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_deltas_that_cannot_be_used_are_refused_before_the_start(
    source: Path, tmp_path: Path, levels: np.ndarray, epsilon: str, message: str
) -> None:
    np.savez(tmp_path / "deltas.npz", **{"a/1": levels})
    given = ["--input", str(source), "--output", str(tmp_path / "out"), "--deltas", str(tmp_path / "deltas.npz")]
    code, said = runs.refusal(protect_baseline.main, *given, "--epsilon", epsilon)
    assert (code, message in said, said.count("\n")) == (1, True, 1), said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_refused_as_deltas(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    for name in ("bad.npz", "none.npz", "photo.jpg"):
        given = ["--input", str(source), "--output", str(tmp_path / "out"), "--deltas", str(tmp_path / name)]
        code, said = runs.refusal(protect_baseline.main, *given)
        assert (code, said.count("\n")) == (1, 1)
        assert said.startswith(f"error: --deltas {tmp_path / name}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "choose a published protection with --method NAME, or give precomputed ones with --deltas FILE"),
        (["--method", "sp", "--deltas", "x.npz"], "choose a published protection with --method NAME, or"),
        (["--method", "spp"], "--method: invalid choice: 'spp'"),
        (["--method", "sp", "--epsilon", "8/255"], "--method sp has a budget of its own: omit --epsilon"),
        (["--method", "sp", "--fit-images", "100"], "--method sp fits every image: omit --fit-images"),
        (["--method", "random", "--epsilon", "1"], "--epsilon must be above 0 and at most 127/255"),
        (["--method", "random", "--epsilon", "200/255"], "at most 127/255"),
        (["--method", "random", "--effort", "0"], "--effort is a share above 0, at most 1"),
        (["--method", "random", "--clusters", "3"], "--clusters only applies to --labels cluster, not true"),
        (["--method", "random", "--surrogate", "timm:x"], "only applies to --labels predicted or cluster, not true"),
        (["--method", "sp", "--network", "small"], "--method sp trains no network to choose: omit --network"),
        (["--method", "em", "--network", "smal"], "unknown target 'smal'"),
        (["--deltas", "x.npz", "--labels", "true"], "--labels has no effect with --deltas: omit it"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_line(
    source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = ["--input", str(source), "--output", str(tmp_path / "out"), *options]
    code, said = runs.refusal(protect_baseline.main, *given)
    assert (code, message in said, said.count("\n")) == (2, True, 1), said


def test_a_sample_without_a_label_ends_the_run_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.png").write_bytes(image_bytes(noise(32, 32)))
    (tmp_path / "in/a.cls").write_bytes(b"0")
    with pytest.raises(InputError, match=r"1 images have no \.cls beside them, e\.g\. b\.png, but others have one"):
        protected(tmp_path / "in", tmp_path / "out", "--method", "random", order=(0,))
    assert not (tmp_path / "out/_scumble/run.json").exists()
    (tmp_path / "in/b.cls").write_bytes(b"cat")
    with pytest.raises(InputError, match=r": b has no usable \.cls label"):
        protected(tmp_path / "in", tmp_path / "out", "--method", "random", order=(0,))


@pytest.mark.parametrize("method", ["random", "ops"])
def test_an_image_that_cannot_be_read_goes_to_quarantine_and_stops_no_other(tmp_path: Path, method: str) -> None:
    (tmp_path / "in").mkdir()
    for number, name in enumerate("abc"):
        (tmp_path / f"in/{name}.png").write_bytes(image_bytes(noise(32, 32, seed=number)))
        (tmp_path / f"in/{name}.cls").write_bytes(b"%d" % (number % 2))
    (tmp_path / "in/b.png").write_bytes(b"no picture")
    given = ["--method", method, "--max-quarantine", "1"]
    run = protected(tmp_path / "in", tmp_path / "out", *given, order=(0,))
    assert [path.name for path in sorted((tmp_path / "out").glob("*.png"))] == ["a.png", "c.png"]
    (name,) = run.output.names(layout.QUARANTINE)
    (line,) = run.output.read(name).splitlines()
    assert (json.loads(line)["key"], json.loads(line)["reason"]) == ("b", "unsupported-format")
    for name in ("a.png", "c.png"):
        assert (tmp_path / "in" / name).read_bytes() != (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("method", ["random", "sp"])
def test_a_baseline_protects_nothing_but_what_it_was_made_for(source: Path, tmp_path: Path, method: str) -> None:
    protected(source, tmp_path / "out", "--method", method)
    given = ["--input", str(source), "--output", str(tmp_path / "again")]
    protection = str(tmp_path / "out/_scumble/protection.safetensors")
    code, said = runs.refusal(protect_imagenet.main, *given, "--protection", protection)
    assert (code, said.count("\n")) == (2, 1)
    assert f"is of the method {method}, which is only compared with" in said


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "sp", "--input", str(source), "--output", str(tmp_path / "out"), "--dry-run"]
    assert protect_baseline.main(given) == 0
    said = capsys.readouterr().out
    assert re.search(r"images +about 48, labels true", said)
    assert re.search(r"method +sp: .* an L2 norm; at 32 px", said)
    assert re.search(r"time +about [\d.]+ (s|min)", said)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_predicts_what_a_method_takes_to_train_its_network(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--input", str(source), "--output", str(tmp_path / "out"), "--dry-run", "--network", "small"]
    fits = {}
    for method in ("em", "em-class"):  # 60 rounds of 20 steps on each picture, and of one
        assert protect_baseline.main([*given, "--method", method]) == 0
        (found,) = re.findall(r"  fit +(?:(\d+) min|([\d.]+) s)", capsys.readouterr().out)
        fits[method] = 60 * float(found[0] or 0) + float(found[1] or 0)
    assert fits["em"] > fits["em-class"] > 0
    said = set()
    for few in ([], ["--fit-images", "10"]):  # a cluster's delta sees 200 images, or all there are
        assert protect_baseline.main([*given, "--method", "em-class", "--labels", "cluster", *few]) == 0
        said |= set(re.findall(r"memory .*", capsys.readouterr().out))
    assert len(said) == 1


@pytest.mark.slow
@pytest.mark.ray
def test_the_job_runs_to_its_end_by_clusters_and_finds_all_done_when_started_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--input", str(source), "--output", str(tmp_path / "out"), "--method", "sp", "--labels", "cluster"]
    given += ["--clusters", "3"]
    command = [sys.executable, str(runs.ROOT / "jobs/protect_baseline.py"), *given, "--surrogate-size", "64"]
    done = subprocess.run([*command, *runs.ONE_WORKER], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "protected    48 images in 3 shards" in done.stdout
    assert "clusters     3 of" in done.stdout
    verified(source, tmp_path / "out", capsys)
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (again.returncode, "3 shards, 0 left" in again.stdout, "stage=" in again.stderr) == (0, True, False)
