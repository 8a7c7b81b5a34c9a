"""verify.py and status.py over an output of uploads: what the ledger says against what lies there."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import status, verify
from jobs.inspection import verification
from pipeline import layout
from pipeline.errors import InputError
from pipeline.storage import folder
from pipeline.storage.store import Store
from tests.support.samples import image_bytes, tar_bytes
from tests.support.uploads import Job, jpeg, patch, small_protection, upload


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Four loose images, a broken one, and a shard with a broken image and a second copy; really protected."""
    folder = tmp_path_factory.mktemp("uploads")
    made = Job(folder, source=Store(str(folder / "in")), output=Store(str(folder / "out")), monkeypatch=None)
    made.protection.write_bytes(small_protection().to_bytes())
    loose = {"a.png": image_bytes(patch(1)), "b/c d.jpg": jpeg(2), "ü.png": image_bytes(patch(3)), "d.jpg": jpeg(4)}
    members = [("1.jpg", jpeg(5)), ("2.jpg", b"no image"), ("3.png", image_bytes(patch(6))), ("3.cls", b"7")]
    shard = tar_bytes([*members, ("4.jpg", jpeg(7)), ("4.ppm", image_bytes(patch(7), "PPM"))])
    upload(made.source, loose | {"bad.jpg": b"no image", "some.tar": shard})
    assert made.run() == 0
    return made


def run(job: Job, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    options = ("--output", job.output.url, "--input", job.source.url, "--decode", "1")
    return verify.main(list(options)), capsys.readouterr().out


def test_an_output_that_nobody_touched_is_whole_and_within_epsilon(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(job, capsys)
    assert code == 0, said
    assert "files        5 re-read and re-hashed" in said
    assert "samples      6 counted, 6 decoded" in said
    assert "originals    5 of 5 files compared" in said
    largest = 0
    for name in ("a.png", "ü.png"):
        ours, theirs = (np.asarray(Image.open(Path(store.root) / name), np.int16) for store in (job.output, job.source))
        largest = max(largest, int(np.abs(ours - theirs).max()))
    assert f"largest change {largest} levels in 3 files written without loss" in said


def test_a_bound_that_was_not_checked_is_not_said_to_hold(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", job.output.url, "--input", job.source.url, "--decode"]
    assert verify.main([*arguments, "0"]) == 0
    said = capsys.readouterr().out
    assert "epsilon      not checked: no file was decoded" in said
    assert "levels" not in said
    assert verify.main([*arguments, "0.01"]) == 0
    assert "samples      6 counted, 6 decoded" in capsys.readouterr().out  # of so few all


def test_originals_that_are_not_there_are_no_comparison(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--output", job.output.url, "--input", str(tmp_path / "wrong")]) == 1
    said = capsys.readouterr().out
    assert "originals    0 of 5 files compared" in said
    assert "wrong: has none of the originals" in said


def test_pictures_beyond_the_usual_limits_were_let_through_by_a_run_and_are_no_problem(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = partial(verification.VerifySettings, max_pixels=100, max_member_bytes=100)
    monkeypatch.setattr(verification, "VerifySettings", lower)  # as if the pictures were so much larger
    assert run(job, capsys)[0] == 0


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("a.png", lambda there, original: original, "a.png: the image is unprotected"),
        ("d.jpg", lambda there, original: there[:-1] + b"x", "d.jpg: SHA-256: found"),
        ("some.tar", lambda there, original: original, "some.tar key 1: the image is unprotected"),
        ("some.tar", lambda there, original: original, "some.tar key 4: unknown-sidecar: member ppm"),
        ("b/c d.jpg", lambda there, original: None, "b/c d.jpg"),
        ("stray.jpg", lambda there, original: b"x", "stray.jpg: in the output without a row"),
    ],
)
def test_what_was_tampered_with_is_named(job: Job, capsys, name, change, words) -> None:  # type: ignore[no-untyped-def]
    path = Path(job.output.root) / name
    before = path.read_bytes() if path.exists() else None
    original = job.source.read(name) if job.source.info(name) else None
    changed = change(before, original)
    path.unlink(missing_ok=True)
    if changed is not None:
        path.write_bytes(changed)
    try:
        code, said = run(job, capsys)
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
    assert code == 1
    assert words in said


def test_status_counts_what_the_ledger_holds(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--output", job.output.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["objects"], found["images"], found["quarantined"]) == (6, 6, 3)
    assert found["reasons"] == {"unsupported-format": 1, "inside of shards": 2}
    assert found["output_bytes"] == sum(map(len, job.outputs().values()))
    assert found["last_run"].startswith("done at 20")


@pytest.mark.parametrize(("name", "command"), [(layout.UPLOADS_LAST_RUN, status), (layout.UPLOADS_ORIGIN, verify)])
def test_a_damaged_record_is_refused_in_one_line(job: Job, name: str, command: Any) -> None:
    before = job.output.read(name)
    job.output.put(name, b'{"epsilon": "much"}')
    try:
        with pytest.raises(InputError, match=rf"^{job.output.url}/{name} is damaged or from another version"):
            command.main(["--output", job.output.url])
    finally:
        job.output.put(name, before)


def test_a_copy_whose_original_is_in_quarantine_now_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = Job.local(tmp_path, monkeypatch)
    upload(local.source, {"a.png": image_bytes(patch(1)), "b.jpg": jpeg(2)})
    assert local.run("--encode", "lossless") == 0
    kept = local.outputs()
    assert set(kept) == {"a.png", "b.jpg.png"}
    upload(local.source, {"a.png": b"no image", "b.jpg": b"neither"}, age_s=1800.0)
    local.run("--encode", "lossless")
    assert local.outputs() == kept
    assert set(local.rows()) == {"a.png", "b.jpg"}
    for row in local.rows().values():
        assert row.detail.endswith("; if the output has a copy, it is of an earlier version")
    capsys.readouterr()
    code, said = run(local, capsys)
    assert code == 0, said
    assert "without a row" not in said


def test_looking_at_an_output_takes_no_right_to_write(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> float:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folder, "clock", refused)
    assert status.main(["--output", job.output.url]) == 0
    assert run(job, capsys)[0] == 0
    assert job.run("--dry-run") == 0
