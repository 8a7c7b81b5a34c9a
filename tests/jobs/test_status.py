"""Status: sums over commits that are never all in memory, and a stage told from what lies in the output."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import status
from jobs.inspection.status import any_status_of, evaluation_status_of, facts_text, progress_text, status_of
from jobs.protection.status_file import StatusFile
from jobs.shared.progress import Progress, progress
from pipeline import layout
from pipeline.errors import InputError, StoreError
from pipeline.runs.fingerprint import Ingredients
from pipeline.runs.run_record import RunRecord, StageProgress
from pipeline.runs.totals import READERS, REFUSING, TOGETHER, totals_of
from pipeline.storage.store import Store
from tests.support.uploads import Job, jpeg, upload

COMMITS = 5000


def commit_fields(number: int) -> dict[str, Any]:
    """A commit as it stands in a file: every tenth shard has one image of 50 refused."""
    refused = {"empty": 1} if number % 10 == 0 else {}
    words = dict.fromkeys(("fingerprint", "input_etag", "output_sha256", "protection_sha256"), "x")
    images = {"num_protected": 50 - len(refused), "num_quarantined": len(refused), "num_members": 100}
    sizes = {"input_size": number, "output_size": 2 * number, "input_image_bytes": 1, "output_image_bytes": 1}
    rest = {
        "max_abs_delta": 16,
        "quarantine": refused,
        "clusters": {str(number % 3): 50 - len(refused)},
        "seconds": {"put": 0.5},
    }
    return {"shard": f"{number:05d}.tar", **words, **images, **sizes, **rest}


def write_output(folder: Path, commits: int, total: int) -> None:
    (folder / layout.COMMITS).mkdir(parents=True)
    ingredients = Ingredients({}, "l", "w", None, None, "cpu", {})
    (folder / layout.RUN).write_bytes(RunRecord("f" * 64, ingredients, "in", total, 0).to_bytes())
    for number in range(commits):
        (folder / layout.commit(f"{number:05d}.tar")).write_text(json.dumps(commit_fields(number)))


class Watched(Store):
    """A store that notes how far its listing has run ahead of what was read."""

    ahead = most = 0
    lock = threading.Lock()

    def names(self, under: str = "") -> Iterator[str]:
        for name in super().names(under):
            with self.lock:
                self.ahead += 1
                self.most = max(self.most, self.ahead)
            yield name

    def read(self, name: str) -> bytes:
        with self.lock:
            self.ahead -= name.startswith(layout.COMMITS)
        return super().read(name)


@pytest.mark.parametrize("place", ["folder", "store"])
def test_status_sums_every_commit_but_holds_only_few_at_a_time(tmp_path: Path, place: str) -> None:
    write_output(tmp_path, COMMITS, COMMITS + 1)
    output = Watched(str(tmp_path))
    if place == "store":  # whose commits are read by many threads
        output = Watched(f"memory://{tmp_path}")
        output.filesystem.put(f"{tmp_path}/", output.root, recursive=True)
    assert status_of(output) == {
        "fingerprint": "f" * 64,
        "stage": "embedding (0 of 5001 shards)",
        "shards": "5000 of 5001 committed",
        "done": False,
        "images": 5000 * 50 - 500,
        "quarantined": 500,
        "reasons": {"empty": 500},
        "input_bytes": 4999 * 2500,
        "output_bytes": 4999 * 5000,
    }
    assert output.most <= (2 * READERS + 2) * TOGETHER < COMMITS / 4


def test_status_is_written_for_people(tmp_path: Path) -> None:
    write_output(tmp_path, 1000, 1000)
    said = {line[:12].rstrip(): line[13:] for line in facts_text(status_of(Store(str(tmp_path))))}
    assert (said["done"], said["images"], said["reasons"]) == ("yes", "49,900", "empty 100")
    assert (said["read"], said["written"]) == ("499.5 kB", "999.0 kB")  # 0 + 1 + … + 999 bytes, and twice that


def test_totals_hold_what_a_report_needs_of_all_commits(tmp_path: Path) -> None:
    write_output(tmp_path, 900, 900)  # clusters 0, 1, 2 by turns; shards 0, 10, 20 … have one image refused
    totals = totals_of(Store(str(tmp_path)))
    assert (totals.shards, totals.input_image_bytes, totals.output_image_bytes) == (900, 900, 900)
    assert totals.seconds == {"put": 450.0}
    assert totals.clusters == {0: 300 * 50 - 30, 1: 300 * 50 - 30, 2: 300 * 50 - 30}
    assert totals.refusing == [f"{10 * number:05d}.tar" for number in range(REFUSING)]


def test_status_tells_the_stage_from_what_the_run_has_left(tmp_path: Path) -> None:
    write_output(tmp_path, 0, 2)
    output = Store(str(tmp_path))
    output.put(layout.features("a.tar"), b"")
    assert status_of(output)["stage"] == "embedding (1 of 2 shards)"
    output.put(layout.CLUSTERING, b"")
    output.put(layout.fitted("0"), b"")
    output.put(layout.fit_checkpoint("1"), b"")
    assert status_of(output)["stage"] == "fitting deltas (1 files finished)"
    output.put(layout.PROTECTION, b"")
    assert status_of(output)["stage"] == "applying"
    output.put(layout.REPORT, b"")
    assert status_of(output)["stage"] == "report written"


def test_status_shows_the_progress_that_another_process_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(tmp_path, 0, 40)
    output, clock = Store(str(tmp_path)), [100.0]
    monkeypatch.setattr("jobs.shared.progress.time.monotonic", lambda: clock[0])
    file = StatusFile(output, "f" * 64)
    with file.stage("apply"), progress("apply", 40, output=output) as bar:
        clock[0] += 2
        bar.step("a.tar", images=100, rejected=1, spent={"decode": 3.0, "encode": 1.0})
        assert "progress" not in status_of(output)  # written every few seconds only
        clock[0] += 8
        bar.step("b.tar", units=9, images=900, rejected=2, spent={"decode": 3.0, "put": 0.5, "encode": 2.5})
        found = status_of(output)["progress"]
        assert (found["done"], found["total"], found["images"], found["quarantined"]) == (10, 40, 1000, 3)
        assert (found["rate"], found["eta"]) == (100.0, 30.0)
        assert found["steps"] == {"decode": 0.6, "encode": 0.35, "put": 0.05}
        said = progress_text({**found, "updated": time.time() - 7})
        assert said.startswith(
            "apply 10 of 40 shards, 100 images/s, 3 quarantined, about 30.0 s left; time: decode 60%,"
        )
        assert re.search(r", encode 35% \(as of [78]\.\d s ago\)$", said)
    file.write("running", stage="measure")
    assert "progress" not in status_of(output)  # of a stage that is over
    file.write("failed", message="the disk is full", exit_code=1)
    assert (status_of(output)["state"], status_of(output)["message"]) == ("failed", "the disk is full")


def test_status_counts_the_trials_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Store(str(tmp_path))
    for name in ("evaluation.json", "trials/a.json", "trials/b.json", "trials/c.pt"):
        output.put(name, b"{}")
    assert evaluation_status_of(output) == {"trials": "2 finished", "report": False}
    with progress("relearn", 4, "trial", output) as bar:
        bar.step("nt on clean")
        bar.write()
        assert status.main(["--output", str(tmp_path)]) == 0
        assert re.search(
            r"^progress     relearn 1 of 4 trials, about .* left \(as of ", capsys.readouterr().out, re.MULTILINE
        )
        bar.step("all others", units=3)
    assert "progress" not in evaluation_status_of(output)


def test_status_shows_how_far_a_run_over_new_uploads_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.local(tmp_path, monkeypatch)
    upload(job.source, {f"{number}.jpg": jpeg(number) for number in range(10)} | {"bad.jpg": b"no image"})
    seen: list[dict[str, Any]] = []
    write = Progress.write

    def watched(bar: Progress) -> None:
        write(bar)
        seen.append(any_status_of(job.output.url)["progress"])

    monkeypatch.setattr("jobs.shared.progress.WRITTEN_EVERY", 0.0)
    monkeypatch.setattr("jobs.uploads.steps._LOOKING", 1e9)
    monkeypatch.setattr(Progress, "write", watched)
    assert job.run() == 0
    assert [(one["done"], one["total"]) for one in seen[:4]] == [(1, 11), (3, 11), (7, 11), (11, 11)]
    assert [one["images"] for one in seen[:4]] == [1, 3, 7, 10]
    assert [one["quarantined"] for one in seen[:4]] == [0, 0, 0, 1]
    assert all(one["rate"] > 0 and one["eta"] >= 0 for one in seen[:4])
    assert progress_text(seen[1]).startswith("uploads 3 of 11 objects, ")
    assert "progress" not in any_status_of(job.output.url)  # it is over
    job.output.delete([layout.UPLOADS_LAST_RUN])  # killed before it could write this
    assert any_status_of(job.output.url)["progress"]["done"] == 11


def test_a_run_that_finds_more_than_it_can_count_yet_claims_no_time_left(tmp_path: Path) -> None:
    with progress("uploads", 0, "object", Store(str(tmp_path)), layout.UPLOADS_PROGRESS) as bar:
        bar.found(40, is_whole=False)
        bar.step("unit", units=4, images=4)
        bar.write()
        written = StageProgress.read(Store(str(tmp_path)), layout.UPLOADS_PROGRESS)
        assert written is not None
        assert (written.total, written.eta) == (40, None)
        assert ", more are being looked for (as of " in progress_text(written.to_json())
        bar.found(40, is_whole=True)
        assert bar.seconds_left is not None


def test_status_of_a_training_is_asked_of_the_file_that_it_will_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, output = str(tmp_path / "universal.safetensors"), Store(str(tmp_path))
    with pytest.raises(InputError, match=r"universal\.safetensors: no such protection, and no training of it has been"):
        any_status_of(url)
    with progress("fit", 100, "percent", output, layout.training_progress("universal.safetensors")) as bar:
        bar.step("10", units=10)
        bar.write()
        assert status.main(["--output", url]) == 0
        assert re.fullmatch(
            r"protection   not yet\nprogress     fit 10 of 100 percent, about .* left \(as of .* ago\)\n",
            capsys.readouterr().out,
        )
    output.put("universal.safetensors", b"1")
    output.delete([layout.training_progress("universal.safetensors")])
    assert any_status_of(url) == {"protection": "there"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_and_a_line_say_how_fast_how_long_what_was_rejected_and_what_takes_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", terminal)
        clock = [100.0]
        with monkeypatch.context() as patch, progress("embed", 4) as bar:
            patch.setattr("jobs.shared.progress.time.monotonic", lambda clock=clock: clock[0])
            bar.started = 100.0
            clock[0] += 10
            bar.step("a.tar", images=500, rejected=3, spent={"model": 9.0, "decode": 1.0})
        shown = terminal.getvalue()
        if terminal.isatty():
            assert "50 images/s, 3 quarantined, model 90% of the time" in shown
            assert "1/4" in shown
        else:
            assert shown == (
                "stage=embed done=1/4 shard=a.tar images=500 rejected=3 rate=50/s eta=30s slowest=model:90%\n"
            )


def test_a_store_that_fails_costs_the_progress_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("the store is full")

    output = Store(str(tmp_path))
    monkeypatch.setattr(output, "put", refuse)
    with progress("apply", 2, output=output) as bar:
        bar.write()


def test_a_folder_without_a_run_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the output of a protection run: _scumble/run\.json not found"):
        status_of(Store(str(tmp_path)))
