"""The doctor finds what would break a run, by looking for real, and says what to do about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import doctor
from pipeline import layout
from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.protection import Protection
from pipeline.errors import ConflictError, SettingsError
from pipeline.hashing import sha256
from pipeline.runs import checkup
from pipeline.runs.checkup import check_codecs, check_gpu, check_output, check_space, check_weights, compare_versions
from pipeline.settings import DEFAULT_SURROGATE
from pipeline.storage.store import Store
from pipeline.surrogates.pretrained import EMBEDDED_WEIGHTS
from tests.support.runs import ROOT, add, write_collection
from tests.support.samples import image_bytes, noise
from tests.support.uploads import small_protection

LITE = "timm:tf_efficientnet_lite0"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Subject -> whole line."""
    return {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}


def test_a_machine_and_a_folder_that_are_fine_get_ok_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=2)
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--surrogate", LITE]
    assert doctor.main([*arguments, "--surrogate-size", "64"]) == 0
    found = lines(capsys)
    expected = ("python", "jpg", "png", "webp", "input", "output", "commits", "scratch", "weights", "gpu", "ray")
    assert set(expected) <= set(found)
    assert "2 shards" in found["input"]
    assert "1280 features from 64 px" in found["weights"]
    assert "(as published)" in found["weights"]
    assert Store(str(tmp_path / "out")).list() == []


def test_what_a_run_would_refuse_is_an_error_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("jobs.inspection.checkup.check_weights", lambda *names: asked.append(names) or [])
    write_collection(tmp_path / "in", shards=2, per_shard=2)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert doctor.main(options) == 0
    assert asked[0][0] == DEFAULT_SURROGATE  # which the run would download
    assert "the first 4 usable ones were decoded" in lines(capsys)["images"]
    first = sorted((tmp_path / "in").glob("*.tar"))[0].name
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / first).touch()
    assert doctor.main(options) == 1
    assert f"holds {first}, which no run of Scumble wrote" in lines(capsys)["output"]
    with tarfile.open(tmp_path / "broken.tar", "w") as tar:
        add(tar, "a.jpg", b"no image at all")
    assert doctor.main(["--input", str(tmp_path / "broken.tar")]) == 1
    assert "none of the first 1,000 can be protected" in lines(capsys)["images"]
    for wrong in (["--workers", "0"], ["--gpus-per-worker", "-1"]):
        with pytest.raises(SettingsError, match=f"{wrong[0]} must be at least"):
            doctor.main(wrong)


def test_without_options_it_looks_at_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert "input" not in lines(capsys)


def test_what_cannot_be_read_is_an_error_and_the_other_checks_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    assert doctor.main(["--input", str(tmp_path / "in"), "--gpus-per-worker", "1"]) == 1
    found = lines(capsys)
    assert found["input"].startswith("error")
    assert "no shards (*.tar, *.tar.gz) found" in found["input"]
    assert found["ray"].startswith("ok")


def test_a_settings_file_of_the_run_tells_it_what_to_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_collection(tmp_path / "in", shards=1, per_shard=2)
    file = tmp_path / "protect.yaml"
    file.write_text(f"input: {tmp_path}/in\nsurrogate: {LITE}\nsurrogate-size: 64\nepsilon: 8/255\n")
    assert doctor.main(["--config", str(file)]) == 0
    assert {"input", "weights"} <= set(lines(capsys))
    file.write_text("inputs: here\n")
    with pytest.raises(SettingsError, match="unknown option 'inputs'"):
        doctor.main(["--config", str(file)])


def test_pictures_are_looked_at_as_the_run_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:  # an image and its mask: two images of one sample otherwise
        add(tar, "a.jpg", image_bytes(noise(40, 40), "JPEG"))
        add(tar, "a.mask.png", image_bytes(noise(40, 40), "PNG"))
    file = tmp_path / "protect.yaml"
    file.write_text(f"input: {tmp_path}/in.tar\nsurrogate: {LITE}\nsurrogate-size: 64\nkeep-sidecar: [mask.png]\n")
    assert doctor.main(["--config", str(file)]) == 0
    assert "the first 1 usable ones" in lines(capsys)["images"]
    arguments = ["--input", f"{tmp_path}/in.tar", "--surrogate", LITE, "--surrogate-size", "64"]
    assert doctor.main([*arguments, "--keep-sidecar", "mask.png"]) == 0
    assert doctor.main(arguments) == 1
    with pytest.raises(SettingsError, match="--surrogate-size must be at least 32"):
        doctor.main(["--surrogate-size", "31"])


def test_an_unknown_option_ends_with_2_and_a_near_match() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), "--surogate", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown option --surogate; did you mean --surrogate")


def test_a_damaged_record_of_a_run_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(str(tmp_path)).put(layout.RUN, b"[]")
    assert doctor.main(["--output", str(tmp_path)]) == 1
    assert f"{layout.RUN} is damaged or from another version of Scumble" in lines(capsys)["output"]


@pytest.mark.s3
def test_a_bucket_is_reached_and_honours_create(bucket: str) -> None:
    assert [one.level for one in check_output(f"{bucket}/out")] == ["ok", "ok"]
    assert Store(f"{bucket}/out").list() == []


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_one_line(s3_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--output", "s3://there-is-no-such-bucket/out"]) == 1
    assert "cannot write s3://there-is-no-such-bucket/out" in lines(capsys)["output"]


@pytest.mark.s3
def test_a_store_that_ignores_conditions_is_a_warning_that_says_what_to_avoid(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_condition(filesystem: Any, path: str, data: bytes) -> None:
        filesystem.pipe_file(path, data)

    monkeypatch.setattr("pipeline.storage.buckets.create", without_condition)
    last = check_output(f"{bucket}/out")[-1]
    assert str(last) == (
        "warning  commits      the store ignores create-if-absent; never run two jobs on one output at the same time, "
        "or use a store that honours If-None-Match"
    )


def test_weights_are_compared_with_the_digest_in_their_name(tmp_path: Path) -> None:
    digest = sha256(EMBEDDED_WEIGHTS.read_bytes())
    right, wrong = (tmp_path / f"lite0-{one}.safetensors" for one in (digest[:8], "0" * 8))
    for copy in (right, wrong):
        shutil.copy(EMBEDDED_WEIGHTS, copy)
    assert "(as published)" in check_weights(LITE, str(right), 64, None)[0].detail
    (found,) = check_weights(LITE, str(wrong), 64, None)
    assert found.level == "error"
    assert f"has SHA-256 {digest[:16]}, but 00000000" in found.detail
    blob = tmp_path / ("ab" * 32)  # as a hub's cache names what it has fetched
    shutil.copy(EMBEDDED_WEIGHTS, blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert check_weights(LITE, str(tmp_path / "model.safetensors"), 64, None)[0].level == "error"


def test_weights_that_do_not_fit_or_are_not_there_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    for file, words in (("w.safetensors", "does not hold the weights of"), ("none", "file not found")):
        assert doctor.main(["--surrogate", LITE, "--surrogate-weights", str(tmp_path / file)]) == 1
        assert words in lines(capsys)["weights"]


def test_a_protection_of_other_weights_is_an_error(tmp_path: Path) -> None:
    means = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    clustering = Clustering(ClusterSpace(), means, means, np.ones(3, np.float32))
    levels = np.zeros((3, 3, 8, 8), np.int8)
    identity = f'{{"name":"{LITE}","weights":"0000","size":64}}'
    protection = Protection("uc", "direct", identity, 16 / 255, clustering, (1, 2, 0), levels, "f" * 64)
    (tmp_path / "p.safetensors").write_bytes(protection.to_bytes())
    with pytest.raises(ConflictError, match=r"fitted for surrogate .*0000.*, not .*bfe99bcbadd301f3.*: use the same"):
        check_weights(LITE, None, 64, str(tmp_path / "p.safetensors"))


def test_little_space_is_a_warning_and_none_that_can_be_written_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda folder: usage(10**9, 0, 10**8))
    assert {one.subject: one.level for one in check_space()} == {"scratch": "warning", "/dev/shm": "warning"}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert check_space()[0].level == "error"


def test_scratch_must_hold_a_shard_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage.listings import Entry

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda folder: usage(10**13, 0, 10**11))
    shards = [Entry("a.tar", 10**10, "e"), Entry("b.tar", 10**9, "e")]
    assert check_space(shards, processes=4)[0].level == "ok"
    found = check_space(shards, processes=6)[0]
    assert found.level == "warning"
    assert "120.0 GB" in found.advice


def test_a_codec_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Image.Image.save

    def save(self: Any, file: Any, kind: str, **options: Any) -> None:
        if kind == "WEBP":
            raise OSError("encoder not available")
        real(self, file, kind, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    levels = {one.subject: one.level for one in check_codecs()}
    assert levels == {"jpg": "ok", "png": "ok", "webp": "error"}


def test_gpus_that_are_asked_for_must_be_there_and_those_that_are_there_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [check_gpu(share)[0].level for share in (0, 1)] == ["ok", "error"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    assert [check_gpu(share)[0].level for share in (0, 1)] == ["warning", "ok"]


def test_a_node_with_other_libraries_is_named_with_what_differs() -> None:
    ours = {"python": "3.11.7", "ray": "2.60.0", "pillow": "13.0.0"}
    assert compare_versions(ours, dict(ours), "10.0.0.7")[0].level == "ok"
    (found,) = compare_versions(ours, ours | {"pillow": "12.0.0"}, "10.0.0.7")
    assert str(found).startswith("error    10.0.0.7     versions differ from the driver: pillow 12.0.0 (driver 13.0.0)")


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("actors.cluster.checkup.connected", _refusing)
    assert doctor.main([]) == 1
    assert lines(capsys)["ray"].startswith("error    ray          the Ray cluster at RAY_ADDRESS does not answer")


def _refusing(asked: Any) -> Any:
    from pipeline.errors import ClusterError

    raise ClusterError("the Ray cluster at RAY_ADDRESS does not answer (…); unset RAY_ADDRESS to run here")


def test_a_protection_is_checked_with_the_surrogate_and_the_size_it_was_fitted_with(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(small_protection().to_bytes())  # at 64 px
    for surrogate in (None, LITE):
        (found,) = check_weights(surrogate, None, None, str(tmp_path / "p.safetensors"))
        assert found.level == "ok"
        assert "1280 features from 64 px" in found.detail
    with pytest.raises(ConflictError):
        check_weights(LITE, None, 96, str(tmp_path / "p.safetensors"))


@pytest.mark.parametrize(
    ("text", "surrogate"),
    [
        ("preset: uc-paper\n", "torchvision:resnet50/IMAGENET1K_V1"),
        (f"preset: uc-paper\nsurrogate: {LITE}\n", LITE),
        ("epsilon: 8/255\n", DEFAULT_SURROGATE),
        ("protection: p.safetensors\n", None),
    ],
)
def test_a_config_means_what_it_means_to_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, surrogate: str | None
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("jobs.inspection.checkup.check_up", lambda given, _: seen.append(given) or [])
    (tmp_path / "c.yaml").write_text(text)
    assert doctor.main(["--config", str(tmp_path / "c.yaml")]) == 0
    assert seen[0].get("surrogate") == surrogate
