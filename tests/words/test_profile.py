"""Where the time of a stage goes, against sums by hand."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.profile import Profile, ProfileRecord, StepClock, Work, as_text
from tests.support.runs import protect, write_collection
from tests.support.uploads import small_protection


def test_the_shares_of_a_worker_add_up_to_the_time_of_the_stage() -> None:
    profile = Profile("embed", began=100.0)
    profile.add(Work("a", 104.0, 106.0, {"wait": 0.5, "model": 1.0}, {"decode": 3.0}, threads=4), 10)
    profile.add(Work("a", 107.0, 109.0, {"wait": 0.5, "model": 1.5}, {"decode": 5.0}, threads=4), 30)
    profile.add(Work("b", 102.0, 110.0, {"model": 8.0}), 80)
    first, second = profile.workers(ended=110.0)
    # by hand: 10 s; 4 s until the first shard, 4 s in shards (0.5 s of them in no step), 2 s between and after them
    assert first.shares == {"start": 0.4, "wait": 0.1, "model": 0.25, "other": 0.05, "idle": 0.2}
    assert first.threads == {"decode": 0.2}  # 8 of 4 x 10 s
    assert (first.images, first.images_per_s) == (40, 8.0)
    assert second.shares == {"start": 0.2, "model": 0.8, "other": 0.0, "idle": 0.0}
    assert all(sum(row.shares.values()) == pytest.approx(1) for row in (first, second))


def test_what_a_shard_cost_counts_threads_that_share_work_and_no_waiting_for_them() -> None:
    work = Work("a", 0.0, 6.0, {"wait": 3.0, "model": 2.0, "put": 0.5}, {"decode": 8.0, "read": 2.0}, threads=4)
    assert work.spent() == {"model": 2.0, "put": 0.5, "decode": 2.0, "read": 0.5}
    assert Work().spent() == {}


def test_the_table_names_every_step_once() -> None:
    profile = Profile("embed", began=0.0)
    profile.add(Work("aaaaaaaaaaaa", 0.0, 1.0, {"model": 1.0}, {"decode": 1.0}), 1000)
    profile.add(Work("b", 0.0, 1.0, {"put": 0.25}), 1)
    head, *rows, note = as_text(profile.workers(ended=1.0)).splitlines()
    assert head.split() == ["worker", "images", "images/s", "start", "model", "put", "other", "idle", "decode*"]
    assert rows[0].split() == ["aaaaaaaa", "1,000", "1,000", "0.0%", "100.0%", "0.0%", "0.0%", "0.0%", "100.0%"]
    assert note == "* in threads that read and decode ahead"


def test_a_clock_charges_a_step_with_what_its_device_still_does() -> None:
    clock = StepClock(lambda: time.sleep(0.02))
    for _ in range(2):
        with clock.step("model"):
            pass
    assert clock.seconds["model"] >= 0.04


@pytest.mark.slow
@pytest.mark.ray
def test_a_profiled_run_says_where_the_time_of_every_worker_went(tmp_path: Path) -> None:
    write_collection(tmp_path / "in", shards=4, per_shard=16)
    (tmp_path / "p.safetensors").write_bytes(small_protection().to_bytes())
    given = ("--protection", str(tmp_path / "p.safetensors"))
    done = protect(str(tmp_path / "in"), str(tmp_path / "out"), *given, "--profile", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "profile of embed" in done.stdout
    assert "profile of apply" in done.stdout
    rows = ProfileRecord.from_bytes((tmp_path / "out/_scumble/profile.json").read_bytes(), "profile.json").workers
    for stage, steps in {"embed": {"wait", "resize", "model"}, "apply": {"decode", "encode", "add"}}.items():
        mine = [row for row in rows if row.stage == stage]
        assert sum(row.images for row in mine) == 64
        for row in mine:
            assert steps <= set(row.shares)
            assert sum(row.shares.values()) == pytest.approx(1, abs=0.02)
