"""Status: sums over commits that are never all in memory, and a stage told from what lies in the output."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.inspection.status import status_of
from pipeline import layout
from pipeline.errors import InputError
from pipeline.runs.fingerprint import Ingredients
from pipeline.runs.run_record import RunRecord
from pipeline.runs.totals import READERS, REFUSING, TOGETHER, totals_of
from pipeline.storage.store import Store

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


def test_a_folder_without_a_run_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the output of a protection run: _scumble/run\.json not found"):
        status_of(Store(str(tmp_path)))
