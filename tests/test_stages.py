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


@pytest.mark.ray
def test_a_failure_of_ours_inside_of_an_actor_is_the_one_line_that_it_was() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout == "StoreError|cannot create out/a.tar: the store is down; start again\n", done.stderr
