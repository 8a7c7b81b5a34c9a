"""Uploads become protected copies of the same name; each once, and again only when it changed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import protect_uploads
from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.load import load_protection
from pipeline.deltas.picture_deltas import DeltaRequest
from pipeline.errors import ConflictError, InputError, SettingsError
from pipeline.hashing import sha256
from pipeline.records import Sample
from pipeline.settings import Settings
from pipeline.shards.names import sample_name
from pipeline.storage.store import Store
from tests.support.runs import ROOT, write_collection
from tests.support.samples import image_bytes, read, tar_bytes
from tests.support.universal import untrained
from tests.support.uploads import Job, jpeg, patch, small_protection, small_surrogate, upload

ODD = {
    "a b/ü/100% + q?*[{~#&'.JPG": jpeg(1),
    "日本/名.png": image_bytes(patch(2)),
    "x" * 180 + ".jpg": jpeg(3),
    "deep/" * 30 + "a.webp": image_bytes(patch(4), "WEBP", lossless=True),
}


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path, store: Store) -> Store:
    """Where uploads arrive: of the same kind as the output."""
    return Store(str(tmp_path / "in")) if store.is_local else Store(request.getfixturevalue("bucket") + "/in")


@pytest.fixture
def job(tmp_path: Path, source: Store, store: Store, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, source=source, output=store, monkeypatch=monkeypatch)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job.local(tmp_path, monkeypatch)


def test_every_image_is_protected_once_under_its_own_name(job: Job) -> None:
    upload(job.source, ODD | {"notes.txt": b"x", "bad.jpg": b"no image", "cat.heic": b"x"})
    assert job.run("--max-quarantine", "0.5") == 0
    outputs = job.outputs()
    assert outputs.keys() == ODD.keys()
    for name, before in ODD.items():
        assert outputs[name] != before
        assert Image.open(io.BytesIO(outputs[name])).format == Image.open(io.BytesIO(before)).format
        difference = np.abs(pixels(outputs[name]) - pixels(before))
        assert 0 < difference.max() <= (16 if name.endswith(("png", "webp")) else 60)  # JPEG is lossy on top
    rows = job.rows()
    assert rows["bad.jpg"].reason == rows["cat.heic"].reason == "unsupported-format"
    assert {name: sha256(data) for name, data in outputs.items()} == {
        name: row.output_sha256 for name, row in rows.items() if row.output
    }
    last = job.last()
    assert (last["new"], last["protected"], last["quarantined"], last["skipped"]) == (6, 4, 2, 1)
    etags = {entry.name: entry.modified for entry in job.output.walk()}
    assert job.run() == 0  # nothing new: nothing read, nothing written but the summary
    assert (job.last()["known"], job.last()["protected"], job.last()["units"]) == (6, 0, 0)
    assert all(etags[name] == entry.modified for name, entry in ((e.name, e) for e in job.output.walk()) if name in ODD)


def test_a_folder_that_is_not_there_claims_no_output(local: Job) -> None:
    local.source = Store(f"{local.source.url}-wrong")
    with pytest.raises(InputError, match="in-wrong"):
        local.run()
    assert list(local.output.names()) == []


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_a_real_protection_gives_what_the_main_job_does_with_the_nearest_cluster(tmp_path: Path) -> None:
    job = Job(tmp_path, source=Store(str(tmp_path / "in")), output=Store(str(tmp_path / "out")), monkeypatch=None)
    exact = {"WEBP": {"lossless": True}}
    files = {
        f"{number}.{kind}": image_bytes(patch(number), form, **exact.get(form, {}))
        for number, (kind, form) in enumerate(FORMS)
    }
    shard = tar_bytes([("s/1.png", files["1.png"]), ("s/1.cls", b"7"), ("s/2.jpg", files["2.jpg"][:99])])
    upload(job.source, files | {"shards/one.tar": shard})
    assert job.run() == 0
    protection, surrogate = small_protection(), small_surrogate()
    rows, outputs = job.rows(), job.outputs()
    for name, data in files.items():
        key, suffix = sample_name(name)
        small = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        features = surrogate.embed_pictures([small]).astype(np.float16)
        (cluster,), (distance,) = protection.clustering.assign(features)
        assert rows[name].cluster == cluster
        assert rows[name].distance == pytest.approx(distance, abs=1e-2)
        wanted = protect_sample(Sample(key, {suffix: data}), LaidDeltas(protection), int(cluster), settings=Settings())
        assert outputs[name] == wanted.sample.members[suffix]
        assert np.abs(pixels(outputs[name]) - pixels(data)).max() <= (16 if suffix != "jpg" else 60)
    (sample,) = read(outputs["shards/one.tar"])
    assert isinstance(sample, Sample)
    assert (sample.members["cls"], sample.members["png"]) == (b"7", outputs["1.png"])
    assert (rows["shards/one.tar"].protected, rows["shards/one.tar"].quarantined) == (1, 1)
    lines = [json.loads(line) for unit in quarantine(job) for line in unit.splitlines()]
    assert [(line["member"], line["reason"]) for line in lines] == [("s/2.jpg", "undecodable")]


FORMS = [("jpg", "JPEG"), ("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")]


def quarantine(job: Job) -> list[str]:
    names = [entry.name for entry in job.output.list(f"{layout.UPLOADS}/quarantine")]
    return [job.output.read(name).decode() for name in names]


def exif_with_gps() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a photograph"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 0.0)})
    return exif.tobytes()


@pytest.mark.parametrize("metadata", ["keep", "strip-gps", "strip"])
def test_exif_and_colour_profile_are_kept_and_places_stripped_as_asked(local: Job, metadata: str) -> None:
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    upload(local.source, {"a.jpg": jpeg(1, exif=exif_with_gps(), icc_profile=icc)})
    assert local.run("--metadata", metadata) == 0
    image = Image.open(io.BytesIO(local.outputs()["a.jpg"]))
    assert image.info["icc_profile"] == icc
    assert image.size == (64, 64)
    exif = image.getexif()
    assert (0x010E in exif) == (metadata != "strip")
    assert bool(exif.get_ifd(0x8825)) == (metadata == "keep")


def test_changed_uploads_are_protected_again_and_deleted_ones_reported(job: Job) -> None:
    upload(job.source, {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "c.jpg": b"broken"})
    assert job.run() == 0
    before = job.outputs()
    time.sleep(0.01)
    upload(job.source, {"a.jpg": jpeg(3), "c.jpg": jpeg(4)}, age_s=1800)
    job.source.delete(["b.jpg"])
    assert job.run() == 0
    last, after = job.last(), job.outputs()
    assert (last["changed"], last["new"], last["deleted"], last["deleted_names"]) == (2, 0, 1, ["b.jpg"])
    assert after["a.jpg"] != before["a.jpg"]
    assert after["b.jpg"] == before["b.jpg"]  # the copy stays
    assert {name: row.version for name, row in job.rows().items()} == {"a.jpg": 2, "b.jpg": 1, "c.jpg": 2}
    assert job.run() == 0
    assert (job.last()["protected"], job.last()["known"]) == (0, 2)


def test_what_was_quarantined_is_not_tried_again_until_it_changes(
    local: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(local.source.root) / "link.jpg").symlink_to("/etc/hostname")
    upload(local.source, {"bad.png": b"broken", "huge.jpg": jpeg(1), "a\\b.jpg": jpeg(2), "good.jpg": jpeg(3)})
    options = ("--max-pixels", "2000", "--max-quarantine", "0.5")
    Path(local.source.path("good.jpg")).write_bytes(image_bytes(patch(3, side=32), "JPEG"))
    assert local.run(*options) == 3
    assert "80.0% of the images were quarantined, --max-quarantine allows 50.0%" in capsys.readouterr().err
    assert {name: row.reason for name, row in local.rows().items()} == {
        "a\\b.jpg": "unsafe-name",
        "bad.png": "unsupported-format",
        "good.jpg": "",
        "huge.jpg": "too-many-pixels",
        "link.jpg": "not-a-file",
    }
    lines = [json.loads(line) for unit in quarantine(local) for line in unit.splitlines()]
    assert sorted(line["member"] for line in lines) == ["a\\b.jpg", "bad.png", "huge.jpg", "link.jpg"]
    assert local.outputs().keys() == {"good.jpg"}
    assert local.run(*options) == 0
    assert (local.last()["quarantined"], local.last()["known"]) == (0, 5)


def test_half_written_uploads_wait_and_a_dry_run_writes_nothing(local: Job, capsys: pytest.CaptureFixture[str]) -> None:
    upload(local.source, {"old.jpg": jpeg(1)})
    upload(local.source, {"young.jpg": jpeg(2)}, age_s=2)
    assert local.run("--settle", "30s", "--dry-run") == 0
    assert not Path(local.output.root).exists()
    shown = capsys.readouterr().out
    assert "new          old.jpg" in shown
    assert "1 new, 0 changed, 0 already done, 1 not settled yet" in shown
    assert local.run("--settle", "30s") == 0
    assert local.outputs().keys() == {"old.jpg"}
    assert local.run("--settle", "1s") == 0
    assert local.outputs().keys() == {"old.jpg", "young.jpg"}


def test_other_formats_are_written_under_names_that_cannot_meet(local: Job) -> None:
    upload(local.source, {"a.jpg": jpeg(1), "a.png": image_bytes(patch(2)), "a.jpg.png": image_bytes(patch(3))})
    assert local.run("--encode", "lossless") == 0
    assert local.outputs().keys() == {"a.jpg.png", "a.png", "a.jpg.png.png"}
    assert np.abs(pixels(local.outputs()["a.jpg.png"]) - pixels(jpeg(1))).max() <= 16


@pytest.mark.s3
def test_an_object_store_may_hold_what_a_folder_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source = Store(request.getfixturevalue("bucket") + "/in")
    job = Job(tmp_path, source=source, output=Store(str(tmp_path / "out")), monkeypatch=monkeypatch)
    upload(source, {"a.jpg": jpeg(1), "a.jpg/b.jpg": jpeg(2), "c//d.jpg": jpeg(3), "e.jpg": jpeg(4)})
    assert job.run() == 0
    assert job.outputs().keys() == {"a.jpg", "e.jpg"}
    assert {job.rows()[name].reason for name in ("a.jpg/b.jpg", "c//d.jpg")} == {"unusable-name", "unsafe-name"}


def test_many_unlike_images_are_a_warning(
    local: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(local.source, {f"{number}.jpg": jpeg(number % 5) for number in range(24)})
    monkeypatch.setattr("pipeline.uploads.deltas.UploadDeltas.is_far", lambda self, cluster, distance: True)
    assert local.run() == 0
    assert local.last()["drift_share"] == 1.0
    assert "100% of the new images are unlike what the protection was fitted on" in capsys.readouterr().err


def test_an_output_belongs_to_one_protection_one_input_and_its_settings(local: Job, tmp_path: Path) -> None:
    upload(local.source, {"a.jpg": jpeg(1)})
    assert local.run() == 0
    with pytest.raises(ConflictError, match=r"was made with a different settings .*strip"):
        local.run("--metadata", "strip")
    local.protection.write_bytes(small_protection().to_bytes())
    with pytest.raises(ConflictError, match="was made with a different protection_sha256"):
        local.run()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x.jpg").write_bytes(b"")
    with pytest.raises(ConflictError, match=r"contains x\.jpg, which was not written by an uploads run"):
        Job(tmp_path, source=local.source, output=Store(str(tmp_path / "theirs")), monkeypatch=None).run()
    with pytest.raises(SettingsError, match="overlap"):
        Job(tmp_path, source=local.source, output=Store(str(tmp_path / "in" / "out")), monkeypatch=None).run()


def test_what_can_be_refused_is_refused_before_anything_is_loaded(local: Job, tmp_path: Path) -> None:
    local.protection.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a protection file"):
        local.run()
    local.protection.unlink()
    with pytest.raises(InputError, match="cannot read"):
        local.run()
    with pytest.raises(SettingsError, match="--protection is missing"):
        protect_uploads.main(["--input", "a", "--output", "b"])
    with pytest.raises(SettingsError, match=r"unknown option --setle; did you mean --settle"):
        protect_uploads.main(["--setle", "3"])
    assert not os.path.exists(local.output.root)


def test_a_settings_file_takes_every_option(local: Job, tmp_path: Path) -> None:
    upload(local.source, {"a.jpg": jpeg(1)})
    config = tmp_path / "uploads.yaml"
    config.write_text(
        f"input: {local.source.url}\noutput: {local.output.url}\nprotection: {local.protection}\n"
        "settle: 0s\nmax-quarantine: 1\nunit-bytes: 1M\nmetadata: strip\n"
    )
    assert protect_uploads.main(["--config", str(config), "--metadata", "keep"]) == 0
    assert local.last()["protected"] == 1


def test_nothing_secret_is_written_or_printed(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    upload(job.source, {"a.jpg": jpeg(1)})
    assert job.run() == 0
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "")
    texts = [job.output.read(entry.name) for entry in job.output.walk() if entry.name.startswith(layout.UPLOADS)]
    shown = capfd.readouterr()
    if len(secret) > 8:
        assert all(secret.encode() not in text for text in [*texts, shown.out.encode(), shown.err.encode()])


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_the_same_comes_out(tmp_path: Path) -> None:
    source = Store(str(tmp_path / "in"))
    upload(source, {f"{number:02d}.jpg": jpeg(number) for number in range(20)} | {"bad.jpg": b""})
    write_collection(tmp_path / "in" / "shards", shards=2, per_shard=6)
    here = Job(tmp_path, source=source, output=Store(str(tmp_path / "here")), monkeypatch=None)
    there = Job(tmp_path, source=source, output=Store(str(tmp_path / "there")), monkeypatch=None)
    assert here.run("--unit-images", "8") == 0
    options = there.arguments("--unit-images", "8", "--ray", "--workers", "2")
    command = [sys.executable, str(ROOT / "jobs/protect_uploads.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert there.outputs() == here.outputs()
    assert there.last()["protected"] == here.last()["protected"] == 32
    assert there.rows().keys() == here.rows().keys()


def test_a_universal_generator_protects_uploads_too(tmp_path: Path) -> None:
    from pipeline.deltas.universal.deltas import UniversalDeltas

    universal = replace(untrained(small_surrogate()), clustering=small_protection().clustering)
    job = Job(tmp_path, source=Store(str(tmp_path / "in")), output=Store(str(tmp_path / "out")), monkeypatch=None)
    for wrong in (
        replace(universal, width=4),
        replace(universal, weights={name: value * np.nan for name, value in universal.weights.items()}),
        replace(universal, epsilon=0.001),
    ):
        with pytest.raises(InputError, match="not a protection file, or truncated"):
            load_protection(wrong.to_bytes())
    job.protection.write_bytes(universal.to_bytes())
    upload(job.source, {"a.png": image_bytes(patch(1)), "b/c.jpg": jpeg(2)})
    assert job.run() == 0
    assert job.outputs().keys() == {"a.png", "b/c.jpg"}
    assert np.abs(pixels(job.outputs()["a.png"]) - pixels(image_bytes(patch(1)))).max() <= 8
    assert all(row.distance is not None and row.cluster >= 0 for row in job.rows().values())

    elsewhere = Job(tmp_path, source=job.source, output=Store(str(tmp_path / "native")), monkeypatch=None)
    elsewhere.protection.write_bytes(universal.to_bytes())
    assert elsewhere.run("--small-images", "native") == 0
    deltas = UniversalDeltas(universal, small_surrogate(), small_images="native")
    (answer,) = deltas.for_pictures([DeltaRequest("a", patch(1), 64, 64)])
    wanted = np.clip(patch(1).astype(np.int16) + answer.delta.levels, 0, 255)
    assert np.array_equal(pixels(elsewhere.outputs()["a.png"]), wanted)
