"""What `make demo` leaves, where DEMO names its folder: two reports, and figures that a demonstration can stand on."""

from __future__ import annotations

import html
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

FOLDER = os.environ.get("DEMO")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="DEMO does not name the folder of a finished `make demo`")
IMAGES = 1_600


@pytest.fixture
def folder() -> Path:
    return Path(FOLDER or "")


def accuracy(folder: Path) -> dict[tuple[str, str], float]:
    rows = pq.read_table(folder / "evaluation/results.parquet").to_pylist()
    return {(row["protection"], row["regime"]): row["accuracy_last"] for row in rows}


def test_both_reports_are_there_and_say_what_they_must(folder: Path) -> None:
    protection = (folder / "protected/_scumble/report.html").read_text()
    assert f"{IMAGES:,} images protected" in protection
    assert "they guarantee nothing" in protection
    evaluation = html.unescape((folder / "evaluation/report.html").read_text()).replace("\u00a0", " ")
    worst = max(value for (name, _), value in accuracy(folder).items() if name == "uc")
    assert f"uc {100 * worst:.1f} %" in evaluation
    assert "Relearned accuracy" in evaluation


def test_the_target_can_be_trained_and_colour_jitter_does_not_undo_the_protection(folder: Path) -> None:
    found = accuracy(folder)
    assert found["clean", "nt"] > 0.8
    assert found["uc", "nt-cg"] < found["clean", "nt-cg"] - 0.1
    # and the truth about it: whoever looks for the delta learns almost as much as from the originals
    worst = {name: max(value for (whose, _), value in found.items() if whose == name) for name in ("clean", "uc")}
    assert worst["clean"] - 0.2 < worst["uc"] < worst["clean"] + 0.05
