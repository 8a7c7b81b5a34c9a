"""What is refused before a run starts, without Ray."""

from __future__ import annotations

import contextlib
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.protection.options import parse_settings
from jobs.protection.prepare import prepare, start_run
from jobs.protection.stages import check_fit_memory, sides_of
from pipeline.errors import ClusterError, ConflictError, InputError, SettingsError
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.storage.store import Store
from tests.deltas.test_protection import LEVELS, made
from tests.support import runs
from tests.support.samples import image_bytes, noise
from tests.support.uploads import SURROGATE, small_protection, small_surrogate


@pytest.mark.parametrize("epsilon", ["16/255", "4/255"])  # one of them is the default
def test_another_epsilon_than_that_of_a_given_protection_is_refused(tmp_path: Path, epsilon: str) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    file = tmp_path / "protection.safetensors"
    file.write_bytes(made(epsilon=8 / 255, levels=LEVELS // 2).to_bytes())
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--protection", str(file)]
    with pytest.raises(SettingsError) as caught:
        prepare(parse_settings([*options, "--epsilon", epsilon]))
    assert str(caught.value) == (f"--epsilon {epsilon}: {file} was made for 8/255; omit --epsilon, or fit a new one")
    (tmp_path / "settings.yaml").write_text(f"epsilon: {epsilon}\n")
    with pytest.raises(SettingsError, match="was made for 8/255"):
        prepare(parse_settings([*options, "--config", str(tmp_path / "settings.yaml")]))


def test_options_of_the_fit_that_a_given_protection_makes_idle_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    (tmp_path / "p.safetensors").write_bytes(small_protection().to_bytes())
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    options += ["--protection", str(tmp_path / "p.safetensors")]
    prepare(parse_settings([*options, "--encode", "lossless", "--workers", "1"]))
    assert capsys.readouterr().err == ""
    prepare(parse_settings([*options, "--steps", "3", "--clusters", "4"]))
    assert capsys.readouterr().err == (
        "warning: no effect with --protection, which is not fitted again: --clusters, --steps\n"
    )


@pytest.mark.parametrize(("images", "says"), [(0, "0 images"), (1, "1 image")])
def test_fewer_than_two_images_are_refused_before_the_start(tmp_path: Path, images: int, says: str) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=images)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--surrogate", SURROGATE]
    with pytest.raises(SettingsError, match=f"the input has {says}, and clusters need at least 2: add images, or give"):
        prepare(parse_settings(options))


def test_a_collection_whose_first_shard_is_broken_is_judged_by_the_next(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=8, side=40)
    with tarfile.open(tmp_path / "in/broken-000.tar", "w") as tar:
        for number in range(70):
            runs.add(tar, f"{number}.jpg", b"no image at all")
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--surrogate", SURROGATE]
    run = prepare(parse_settings(options))
    assert run.settings.surrogate_size == 160  # of small pictures
    assert sides_of(run) == [40] * 8


def test_a_given_protection_alone_says_method_surrogate_and_epsilon(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    (tmp_path / "p.safetensors").write_bytes(replace(small_protection(), epsilon=20 / 255).to_bytes())
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    options += ["--protection", str(tmp_path / "p.safetensors")]
    run = prepare(parse_settings(options))
    assert run.surrogate.id == small_surrogate().id
    assert (run.settings.surrogate, run.settings.surrogate_size) == (SURROGATE, 64)
    assert (run.settings.method, run.settings.epsilon) == ("uc", 20 / 255)
    assert prepare(parse_settings([*options, "--surrogate", SURROGATE])).plan.fingerprint == run.plan.fingerprint
    with pytest.raises(ConflictError, match="the protection was fitted for surrogate .*64.*, not .*96"):
        prepare(parse_settings([*options, "--surrogate-size", "96"]))


@pytest.mark.parametrize(
    ("side", "given", "seen"),
    [(64, [], 160), (100, [], 224), (64, ["--surrogate-size", "96"], 96), (64, ["--size", "224"], 224)],
)
def test_small_images_are_embedded_at_160_pixels_unless_told_otherwise(
    tmp_path: Path, side: int, given: list[str], seen: int
) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4, side=side)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--clusters", "2"]
    run = prepare(parse_settings([*options, "--surrogate", EMBEDDED_SURROGATE, *given]))
    assert run.surrogate.input_size == seen
    assert run.settings.surrogate_size == (None if seen == 224 else seen)
    assert run.record.ingredients.settings["surrogate_size"] == run.settings.surrogate_size


def test_a_transformer_sees_small_images_at_the_size_of_its_weights(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4, side=64)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--clusters", "2"]
    run = prepare(parse_settings([*options, "--surrogate", "open_clip:ViT-S-32-alt/random-0"]))
    assert (run.settings.surrogate_size, run.surrogate.input_size) == (None, 224)


@pytest.mark.parametrize("content", ["{}", '{"fingerprint": 1}', "not JSON"])  # of another version, or damaged
def test_a_run_that_is_not_understood_is_not_resumed_but_may_be_overwritten(tmp_path: Path, content: str) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    record = tmp_path / "out/_scumble/run.json"
    record.parent.mkdir(parents=True)
    record.write_text(content)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--clusters", "2"]
    options += ["--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", "64"]
    with pytest.raises(InputError, match="run.json is damaged or from another version of Scumble"):
        prepare(parse_settings(options))
    assert len(prepare(parse_settings([*options, "--overwrite"])).plan.left) == 1
    assert not record.exists()


def test_overwriting_takes_what_an_earlier_run_wrote_and_leaves_the_rest(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    runs.write_collection(source, shards=2, per_shard=4)
    (source / "loose").mkdir()
    (source / "loose/a.jpg").write_bytes(image_bytes(noise(40, 40), "JPEG"))
    options = ["--input", str(source), "--output", str(output), "--clusters", "2"]
    options += ["--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", "64"]
    start_run(prepare(parse_settings([*options, "--encode", "lossless"])))
    shards = [path.name for path in sorted(source.glob("*.tar"))]
    (output / "loose").mkdir()
    written = [*shards, "loose/a.jpg.png", f"_scumble/commits/{shards[1]}.json"]
    for name in [*written, "mine.txt"]:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("x")
    (source / shards[1]).unlink()  # neither of these is in the input of the second run
    (source / "loose/a.jpg").unlink()
    run = prepare(parse_settings([*options, "--overwrite"]))
    assert [shard.name for shard in run.plan.left] == shards[:1]
    assert [name for name in run.output.names()] == ["mine.txt"]


@pytest.mark.parametrize("stop", range(8))
def test_overwriting_may_be_stopped_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    runs.write_collection(source, shards=2, per_shard=4)
    options = ["--input", str(source), "--output", str(output), "--clusters", "2"]
    options += ["--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", "64"]
    start_run(prepare(parse_settings(options)))
    shards = [path.name for path in sorted(source.glob("*.tar"))]
    for name in [*shards, *(f"_scumble/commits/{shard}.json" for shard in shards), "_scumble/report.html"]:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("x")
    left, delete = [stop], Store._delete

    def killed(store: Store, name: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(store, name)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_delete", killed)
        with contextlib.suppress(KeyboardInterrupt):
            prepare(parse_settings([*options, "--overwrite"]))
    committed = {path.name.removesuffix(".json") for path in output.glob("_scumble/commits/*.json")}
    assert committed <= {path.name for path in output.glob("*.tar")}
    (source / shards[1]).unlink()  # now the plan alone knows that it was written
    run = prepare(parse_settings([*options, "--overwrite"]))
    assert [name for name in run.output.names()] == []


def test_a_folder_or_a_picture_is_no_protection(tmp_path: Path) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    (tmp_path / "old/_scumble").mkdir(parents=True)
    (tmp_path / "old/_scumble/protection.safetensors").write_bytes(b"x")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff" * 20)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--protection"]
    with pytest.raises(SettingsError, match=r"old is a folder: name .*old/_scumble/protection\.safetensors$"):
        prepare(parse_settings([*options, f"{tmp_path}/old/"]))
    with pytest.raises(InputError, match=r"--protection .*a\.jpg: not a protection file"):
        prepare(parse_settings([*options, f"{tmp_path}/a.jpg"]))


def test_images_to_fit_on_that_no_node_can_hold_are_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.write_collection(tmp_path / "in", shards=2, per_shard=16)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--clusters", "2"]
    options += ["--surrogate", EMBEDDED_SURROGATE, "--workers", "1"]
    node = {"CPU": 2.0, "memory": 2.5 * 32 * 3 * 64 * 64}  # two copies of 32 images at 64 px, and half of one
    monkeypatch.setattr("actors.cluster.connect._nodes", lambda: [node])
    monkeypatch.setattr("actors.cluster.connect.is_autoscaler_v2", lambda **_: False)
    every = prepare(parse_settings([*options, "--fit-images", "all"]))
    check_fit_memory(every)
    node["memory"] *= 0.7
    check_fit_memory(prepare(parse_settings(options)))  # 10,000 images of this size are below what is judged
    with pytest.raises(ClusterError, match=r"^fitting on 32 images at 64 px \(lower --fit-images or --workers\): "):
        check_fit_memory(every)
