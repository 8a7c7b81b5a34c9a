"""What a dry run says beside its figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs import protect_imagenet
from jobs.protection import dry_run
from jobs.protection.dry_run import print_hint
from pipeline import layout
from pipeline.measures.estimate import Estimate
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.storage.store import Store
from tests.support.runs import write_collection
from tests.support.uploads import small_protection


def estimated(images: int, apply: float, fit: float) -> Estimate:
    return Estimate(images, (64, 64), 1.0, 10, embed=0.01, apply=apply, fit=fit, makes_deltas=True)


def test_a_faster_generator_is_named_where_it_saves_time(capsys) -> None:
    # two workers; of a million images: 10,000 s of steps and 500 s of fit, or 1,000 s of passes and 800 s of fit,
    # beside 5,000 s of embedding and a minute or two
    print_hint(
        estimated(1_000_000, 0.02, 500.0), estimated(1_000_000, 0.002, 800.0), workers=2, what="--generator x protects"
    )
    said = capsys.readouterr().out
    assert re.fullmatch(r"hint +--generator x protects, and would take about 11[4-7] min\n", said)
    print_hint(estimated(5_000, 0.02, 500.0), estimated(5_000, 0.002, 800.0), workers=2, what="--generator x protects")
    assert capsys.readouterr().out == ""


def test_what_is_left_of_a_run_is_predicted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_collection(tmp_path / "in", shards=2, per_shard=6, side=32)
    given = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--surrogate", EMBEDDED_SURROGATE]
    command = [*given, "--clusters", "3", "--generator", "direct", "--dry-run"]
    assert protect_imagenet.main(command) == 0
    whole = capsys.readouterr().out
    assert "fitted       by an earlier start" not in whole
    output = Store(str(tmp_path / "out"))
    output.put(layout.PROTECTION, small_protection().to_bytes())  # 4 clusters
    assert protect_imagenet.main(command) == 0
    said = capsys.readouterr().out
    assert "fitted       by an earlier start: only applying is left" in said
    assert "clusters     4," in said
    assert re.search(r"\n  embed +0\.0 s\n", said)
    assert re.search(r"\n  fit +0\.0 s\n", said)
    assert "memory " not in said
    monkeypatch.setattr(dry_run, "is_left", lambda run: False)
    assert protect_imagenet.main(command) == 0
    said = capsys.readouterr().out
    assert "nothing is left to do but to write the report again" in said
    assert "embed" not in said
