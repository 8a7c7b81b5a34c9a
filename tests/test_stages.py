"""What a user reads when an actor of a stage fails, on a real cluster."""

from __future__ import annotations

import os
import re
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
import ray
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
            file.write(f"{time.time()}\\n")
        second = len(list(self.folder.iterdir())) == 2  # whichever that is: Ray Data hands them out in any order
        while second and len(tries.read_text().splitlines()) == 1:
            time.sleep(0.1)  # nobody hears of it until it has been asked for again
        return done_columns([ShardDone(shard.name, 1, 0, shard.size, 0.0)])

jobs.stages.PATIENCE_SECONDS, jobs.stages.WAVE = 10.0, 3
with connected(SimpleNamespace(workers=None, gpus_per_worker=0.0, debug=False)):
    shards = [Shard(name, 1, "") for name in "abcd"]
    answers = jobs.stages.over_shards(shards, Losing, (Path(sys.argv[1]),), Workers(1, 1.0, 0.0))
    print(sorted(done.name for done in answers))
    tables = jobs.stages._collected(shards, Losing, (Path(sys.argv[2]),), Workers(1, 1.0, 0.0))
    print(sorted(name for table in ray.get(tables) for name in table["name"].to_pylist()))
"""


@pytest.mark.ray
def test_an_answer_that_never_comes_is_asked_for_again_and_the_others_are_not(tmp_path: Path) -> None:
    streamed, collected = tmp_path / "streamed", tmp_path / "collected"
    streamed.mkdir()
    collected.mkdir()
    done = run(LOSES, str(streamed), str(collected))
    assert done.stdout == 2 * "['a', 'b', 'c', 'd']\n", done.stderr
    answered, lost = asked(streamed)[:2]
    assert (answered, lost) == (1, 2)
    assert asked(collected)[1] == 2
    assert re.search(
        r"warning: no answer from any worker for \d+ s; asking again for the 3 shards that are left", done.stderr
    )
    assert "asking again for the 4 shards that are left" in done.stderr  # what is collected comes whole or not at all


def asked(folder: Path) -> list[int]:
    """How often each shard was, in the order in which an actor first saw them."""
    return [len(times) for times in sorted(tries.read_text().splitlines() for tries in folder.iterdir())]
