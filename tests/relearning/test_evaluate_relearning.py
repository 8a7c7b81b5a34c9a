"""The relearning evaluation as a user runs it: real command, real shards, and the files it leaves."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ray.exceptions import OutOfMemoryError, RayActorError

from jobs import evaluate_relearning
from jobs.evaluation.options import parse_evaluation
from jobs.evaluation.steps import load_collections
from pipeline.errors import ClusterError, SettingsError, ending
from pipeline.records import Shard
from pipeline.relearning.collection import load_labelled
from pipeline.relearning.denoisers.denoiser import DenoiserRecipe, train_denoiser
from pipeline.relearning.denoisers.pairs import denoiser_digest, pair_up
from pipeline.storage.store import Store
from tests.support import runs
from tests.support.samples import image_bytes, noise

pytestmark = pytest.mark.ray
JOB = str(runs.ROOT / "jobs/evaluate_relearning.py")


def protect_by_class(source: Path, output: Path) -> None:
    """A copy of every shard with one block pattern per label: unlearnable examples at their strongest."""
    output.mkdir()
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as given, tarfile.open(output / path.name, "w") as made:
            members = {member.name: given.extractfile(member).read() for member in given}  # type: ignore[union-attr]
            for name, data in members.items():
                if name.endswith((".jpg", ".png")):
                    label = int(members[name.rpartition(".")[0] + ".cls"])
                    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)
                    signs = np.random.default_rng(label).choice([-1, 1], (8, 8, 3)).repeat(8, 0).repeat(8, 1)
                    data = image_bytes((pixels + 16 * signs).clip(0, 255).astype(np.uint8))
                    name = name.rpartition(".")[0] + ".png"
                runs.add(made, name, data)


def evaluate(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, JOB, *options], capture_output=True, text=True, check=False, timeout=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relearning")
    runs.write_collection(folder / "clean", shards=4, per_shard=48)
    runs.write_collection(folder / "test", shards=1, per_shard=48, seed=1)
    protect_by_class(folder / "clean", folder / "protected")
    return folder


@pytest.fixture(scope="module")
def done(data: Path) -> subprocess.CompletedProcess[str]:
    return evaluate(*options(data, "--shares", "samples:1,samples:0.5", "--labellings", "original"))


def options(data: Path, *more: str) -> list[str]:
    return [
        *("--preset", "smoke", "--clean", str(data / "clean"), "--test", str(data / "test")),
        *("--protected", f"blocks={data / 'protected'}", "--output", str(data / "out"), "--epochs", "3"),
        *("--regimes", "nt-cg,nt", *more),
    ]


def test_every_trial_has_a_row_with_its_settings_and_accuracies(data: Path, done) -> None:
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(data / "out/results.parquet").to_pylist()
    cells = {(row["protection"], row["regime"], row["share"]) for row in rows}
    assert cells == {
        (arm, regime, share)
        for regime in ("nt", "nt-cg")
        for arm, share in (
            ("clean", "samples:1"),
            ("blocks", "samples:1"),
            ("blocks", "samples:0.5"),
            ("clean-part", "samples:0.5"),
        )
    }
    for row in rows:
        assert 0 <= row["accuracy_last"] <= row["accuracy_best"] <= 1
        assert row["num_classes"] == 4
        assert row["majority"] == 0.25
        assert row["num_test"] == 48
    histories = pq.read_table(data / "out/histories.parquet").to_pylist()
    assert len(histories) == 3 * len(rows)


def test_half_a_share_protects_half_and_leaves_the_rest_for_the_control(data: Path, done) -> None:
    rows = {(r["protection"], r["share"]): r for r in pq.read_table(data / "out/results.parquet").to_pylist()}
    whole, half = rows["blocks", "samples:1"], rows["blocks", "samples:0.5"]
    assert whole["num_protected"] == whole["num_train"] == rows["clean", "samples:1"]["num_train"]
    assert half["num_train"] == whole["num_train"]
    assert half["num_train"] - half["num_protected"] == rows["clean-part", "samples:0.5"]["num_train"]
    assert 0.35 < half["num_protected"] / half["num_train"] < 0.65


def test_the_relearned_figure_is_the_largest_over_regimes_and_stands_in_the_report(data: Path, done) -> None:
    rows = pq.read_table(data / "out/results.parquet").to_pylist()
    worst = max(r["accuracy_last"] for r in rows if (r["protection"], r["share"]) == ("blocks", "samples:1"))
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("blocks"))
    assert f"{worst:.1%}" in line
    assert "2 tried" in line
    assert f"{100 * worst:.1f}" in (data / "out/report.html").read_text()


def test_the_page_shows_the_settings_and_keeps_the_users_order(data: Path, done) -> None:
    page = (data / "out/report.html").read_text()
    settings = dict(re.findall(r'<td class="mono">(\w+)</td><td class="mono">(.*?)</td>', page))
    assert (settings["regimes"], settings["shares"]) == ("nt-cg, nt", "samples:1, samples:0.5")
    assert (settings["epochs"], settings["recipe"]) == ("3", "fast")
    assert not {"clean", "test", "protected", "output"} & set(settings)  # URLs, which may hold secrets
    assert page.index('by epoch of small under nt-cg"') < page.index('by epoch of small under nt"')


def test_the_same_command_again_trains_nothing(data: Path, done) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (data / "out/trials").iterdir()}
    again = evaluate(*options(data, "--shares", "samples:1,samples:0.5", "--labellings", "original"))
    assert again.returncode == 0, again.stderr
    assert "8 trials, 0 left" in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in (data / "out/trials").iterdir()} == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_evaluation_killed_then_interrupted_goes_on_from_its_last_epoch_to_the_same_rows(
    data: Path, tmp_path: Path
) -> None:
    def command(output: Path) -> list[str]:
        return [
            sys.executable,
            JOB,
            *options(data, "--regimes", "nt", "--epochs", "4", "--output", str(output), "--workers", "1"),
        ]

    process = subprocess.Popen(
        command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    runs.wait_for(lambda: any((tmp_path / "killed/trials").glob("*.pt")), process)  # type: ignore[arg-type]
    runs.kill_tree(process)  # type: ignore[arg-type]
    assert any((tmp_path / "killed/trials").glob("*.pt"))
    again = subprocess.Popen(
        command(tmp_path / "killed"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    runs.wait_for(lambda: bool(runs.named(runs.descendants(again.pid), "ray::ImplicitFunc")), again)
    again.send_signal(signal.SIGINT)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to resume"
    for output in ("killed", "quiet"):
        assert subprocess.run(command(tmp_path / output), capture_output=True, check=False).returncode == 0
    rows = {name: sorted((tmp_path / name / "trials").glob("*.json")) for name in ("killed", "quiet")}
    assert [path.name for path in rows["killed"]] == [path.name for path in rows["quiet"]]
    for ours, theirs in zip(rows["killed"], rows["quiet"], strict=True):
        one, other = json.loads(ours.read_text()), json.loads(theirs.read_text())
        assert one["history"] == other["history"]
        assert one["accuracy_last"] == other["accuracy_last"]
    assert not list((tmp_path / "killed/trials").glob("*.pt"))


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        (["--targets", "smal"], 2, "did you mean small"),
        (["--regimes", "nt,ntcg"], 2, "did you mean nt-cg"),
        (["--labellings", "originl"], 2, "original"),
        (["--regimes", "nt,self-pairs"], 2, "needs --pairs OTHER=THEIRS: protect other pictures"),
        (["--regimes", "purify", "--pairs", "a=b=c"], 2, "argument --pairs: 'a=b=c' is not OTHER=THEIRS"),
        (["--protected", "sp"], 2, "'sp' is not NAME=URL"),
        (["--epochs", "few"], 2, "'few' is not a whole number"),
        (["--regimes", "leaked-pairs:1"], 2, "at least 2 pairs"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_cluster_is_asked(data: Path, changed, code, words) -> None:
    ended, stderr = runs.refusal(evaluate_relearning.main, *options(data, *changed))
    assert ended == code
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("error", [OutOfMemoryError("killed by the memory monitor"), RayActorError()])
def test_an_evaluation_that_runs_out_of_memory_is_no_wrong_usage(
    data: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_room(*_: object) -> None:
        raise error

    monkeypatch.setattr("jobs.evaluation.steps.workers_for", no_room)
    with pytest.raises(ClusterError, match="for lack of memory: give it more, or use fewer --workers") as raised:
        load_collections(parse_evaluation(options(data)))
    assert ending(raised.value)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        (["--gpus-per-worker", "1"], 1, "no node of the Ray cluster has 1 GPU"),
        (["--test", "nowhere"], 2, "nowhere"),
    ],
)
def test_what_only_the_cluster_can_tell_is_refused_before_anything_is_trained(data: Path, changed, code, words) -> None:
    refused = evaluate(*options(data, *changed))
    assert refused.returncode == code
    (line,) = refused.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert words in line
    assert "stage=relearn" not in refused.stderr


@pytest.mark.slow
def test_collections_that_do_not_fit_each_other_are_refused(data: Path, tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "other", shards=5, per_shard=8)
    refused = evaluate(*options(data), "--protected", f"other={tmp_path / 'other'}", "--output", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "error: other: " in refused.stderr
    assert "keys are not in --clean, e.g. 004/0000" in refused.stderr


def test_a_dry_run_says_trials_memory_and_time_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    done = evaluate(*options(data, "--dry-run", "--workers", "2", "--images", "100", "--output", str(tmp_path / "out")))
    assert done.returncode == 0, done.stderr
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    images = [int(number) for number in re.findall(r"(\d+)(?:,|$)", found["images"].partition(", at")[0])]
    assert images == [100, pytest.approx(48, abs=6), 100]
    assert found["images"].endswith("at 64 px")
    assert found["trials"] == "4, 2 at a time"
    each = 3 * 64 * 64
    assert found["memory"].startswith(f"{each * sum(images) / 1e6:.1f} MB per node")
    assert re.match(r"about [\d.]+ (s|min)", found["time"])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_times_the_first_shard_that_has_images(data: Path, tmp_path: Path) -> None:
    for name in ("clean", "test", "protected"):
        (tmp_path / name).mkdir()
        for shard in (data / name).glob("*.tar"):
            (tmp_path / name / shard.name).write_bytes(shard.read_bytes())
    with tarfile.open(tmp_path / "clean/000-first.tar", "w") as tar:
        runs.add(tar, "x/broken.jpg", b"no image")
        runs.add(tar, "x/broken.cls", b"0")
    done = evaluate(*options(tmp_path, "--dry-run", "--output", str(tmp_path / "out")))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^time +about ", done.stdout, re.MULTILINE)


def write_pairs(folder: Path) -> None:
    """Pictures without labels, and copies of them with one pattern: what an adversary makes who protects his own."""
    signs = np.random.default_rng(5).choice([-1, 1], (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    for name, levels in (("other", 0), ("theirs", 16)):
        (folder / name).mkdir()
        with tarfile.open(folder / name / "a.tar", "w") as tar:
            for number in range(24):
                pixels = noise(64, 64, seed=number) // 2 + 64 + levels * signs
                runs.add(tar, f"{number:03d}.png", image_bytes(pixels.astype(np.uint8)))


@pytest.mark.slow
def test_a_denoiser_cleans_every_arm_says_what_it_gained_and_is_not_trained_twice(data: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    stores = [Store(str(tmp_path / name)) for name in ("other", "theirs")]
    loaded = [load_labelled(store, [Shard("a.tar", 0, "")], side=64, has_labels=False) for store in stores]
    pairs = pair_up(*loaded)
    quick = DenoiserRecipe(width=8, batch_size=8, rates=(3e-3,), max_steps=40, every=20)
    digest = denoiser_digest(*pairs, DenoiserRecipe(), 0)
    made = train_denoiser(*map(torch.from_numpy, pairs), seed=0, recipe=quick, digest=digest)
    kept = tmp_path / f"out/denoisers/{digest[:20]}.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(made.to_bytes())
    before = kept.stat().st_mtime_ns
    given = ["--regimes", "nt,self-pairs+cg", "--epochs", "1", "--output", str(tmp_path / "out")]
    done = evaluate(*options(data, *given, "--pairs", f"{tmp_path / 'other'}={tmp_path / 'theirs'}"))
    assert done.returncode == 0, done.stderr
    said = f"self-pairs: gains {made.gain_db:.1f} dB on the held-out part of its 24 pairs; trained before"
    assert said in done.stdout
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert kept.stat().st_mtime_ns == before
    rows = {(r["protection"], r["regime"]): r for r in pq.read_table(tmp_path / "out/results.parquet").to_pylist()}
    blocks, clean = rows["blocks", "self-pairs+cg"], rows["clean", "self-pairs+cg"]
    assert blocks["denoiser_own_db"] == clean["denoiser_own_db"] == pytest.approx(made.gain_db)
    assert clean["denoiser_here_db"] is None
    assert blocks["data"] != rows["blocks", "nt"]["data"]
    assert re.search(rf"self-pairs\+cg on blocks +{made.gain_db:.1f} +{blocks['denoiser_here_db']:.1f}\n", done.stdout)
    assert "<h2>Denoisers</h2>" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
def test_a_dry_run_says_how_long_denoisers_take_at_most(data: Path, tmp_path: Path) -> None:
    given = ["--dry-run", "--regimes", "purify,leaked-pairs:20", "--side", "32", "--output", str(tmp_path / "out")]
    done = evaluate(*options(data, *given))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("denoisers ")]
    assert re.match(r"denoisers    at most [\d.]+ (s|min|h \d+ min) each, as measured on a CPU here: ", line)
    assert line.endswith("one for purify, before the trials; 1 for leaked pairs, one per trial")


def test_a_settings_file_takes_lists_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "evaluation.yaml").write_text(
        "preset: smoke\nclean: a\ntest: b\noutput: c\nprotected: {uc: one, sp: [two, three]}\n"
        "regimes: [nt, 'st-cg[reduce=pca2,threshold=0.5]']\nseeds: [3, 4]\ntargets: small\n"
    )
    settings = parse_evaluation(["--config", str(tmp_path / "evaluation.yaml"), "--epochs", "7", "--test", "d"])
    assert settings.protected == {"uc": ("one",), "sp": ("two", "three")}
    assert settings.regimes == ("nt", "st-cg[reduce=pca2,threshold=0.5]")
    assert (settings.seeds, settings.epochs, settings.test, settings.targets) == ((3, 4), 7, "d", ("small",))


def test_several_urls_are_fits_of_one_protection_each_an_arm_of_its_own() -> None:
    given = ["--clean", "a", "--test", "b", "--output", "c", "--protected", "uc=1,s3://x/{2,3}.tar,[4,5]", "sp=6"]
    settings = parse_evaluation([*given, "--seeds", "0,1", "--shares", "samples:1,samples:0.5"])
    assert settings.protected == {"uc": ("1", "s3://x/{2,3}.tar", "[4,5]"), "sp": ("6",)}
    assert settings.arms == {"uc": "1", "uc, fit 2": "s3://x/{2,3}.tar", "uc, fit 3": "[4,5]", "sp": "6"}
    trials = settings.trials(
        {name: f"of {name}" for name in ("clean", "clean-part", *settings.arms)}, {"original": "l"}
    )
    assert len(trials) == len({trial.key for trial in trials}) == 2 * (1 + 1 + 2 * 4)  # seeds x (both controls, arms)
    assert {(t.fit, t.arm, t.data) for t in trials if t.protection == "uc"} == {
        *((0, "uc", "of uc"), (1, "uc, fit 2", "of uc, fit 2"), (2, "uc, fit 3", "of uc, fit 3"))
    }
    with pytest.raises(SettingsError, match="--protected uc lists the same URL twice: 1, 1"):
        parse_evaluation([*given[:-3], "--protected", "uc=1,1"])
    with pytest.raises(SettingsError):
        parse_evaluation([*given[:-3], "--protected", "uc=1,,2"])


def test_pairs_are_two_urls_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "evaluation.yaml").write_text("clean: a\ntest: b\noutput: c\nregimes: [self-pairs]\npairs: {x: s3://y}")
    assert parse_evaluation(["--config", str(tmp_path / "evaluation.yaml")]).pairs == ("x", "s3://y")
    given = ["--clean", "a", "--test", "b", "--output", "c", "--regimes", "purify", "--pairs", "other/=theirs/"]
    assert parse_evaluation(given).pairs == ("other/", "theirs/")


def test_protected_copies_add_up_over_the_command_line() -> None:
    given = ["--clean", "a", "--test", "b", "--output", "c", "--protected", "uc=1", "sp=2", "--protected", "cw=3"]
    assert parse_evaluation(given).protected == {"uc": ("1",), "sp": ("2",), "cw": ("3",)}
