"""What a user reads when an actor of a stage fails, on a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAILS = """
from types import SimpleNamespace
import ray
from actors.connect import connected
from jobs.stages import ray_failures
from pipeline.errors import StoreError

class Failing:
    def __call__(self, batch):
        raise StoreError("cannot create out/a.tar: the store is down; start again")

with connected(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)):
    try:
        with ray_failures():
            rows = ray.data.from_items([1, 2])
            list(rows.map_batches(Failing, compute=ray.data.ActorPoolStrategy(size=1)).iter_batches())
    except StoreError as error:
        print(f"{type(error).__name__}|{error}")
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


@pytest.mark.ray
def test_a_failure_of_ours_inside_of_an_actor_is_the_one_line_that_it_was() -> None:
    done = run(FAILS)
    assert done.stdout == "StoreError|cannot create out/a.tar: the store is down; start again\n", done.stderr


LOSES = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import jobs.stages
from actors.batches import ShardDone, done_columns, shards_of
from actors.connect import Workers, connected
from pipeline.records import Shard

class Losing:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch):
        (shard,) = shards_of(batch)
        tries = self.folder / shard.name
        with tries.open("a") as file:
            file.write("x")
        if shard.name == "b" and len(tries.read_text()) == 1:
            time.sleep(1000)  # as if the answer had been lost
        return done_columns([ShardDone(shard.name, 1, 0, shard.size, 0.0)])

jobs.stages.PATIENCE_SECONDS, jobs.stages.WAVE = 10.0, 3
with connected(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)):
    shards = [Shard(name, 1, "") for name in "abcd"]
    answers = jobs.stages.over_shards(shards, Losing, (Path(sys.argv[1]),), Workers(1, 1.0, 0.0))
    print(sorted(done.name for done in answers))
"""


@pytest.mark.ray
def test_an_answer_that_never_comes_is_asked_for_again_and_the_others_are_not(tmp_path: Path) -> None:
    done = run(LOSES, str(tmp_path))
    assert done.stdout == "['a', 'b', 'c', 'd']\n", done.stderr
    assert (tmp_path / "a").read_text() == "x"
    assert (tmp_path / "b").read_text() == "xx"
    assert "warning: no answer from any worker for 10 s; asking again for the 3 shards that are left" in done.stderr
