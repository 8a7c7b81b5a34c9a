"""A group of Ray Train workers: what would fail again ends it at once, with the words of the worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch

from actors.cluster.failures import Failure
from actors.cluster.placement import Workers
from actors.cluster.train_group import train_group
from actors.fit_queue import FitQueue
from pipeline.errors import InputError
from tests.support.runs import local_cluster

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Task:
    queue: Any
    starts: Path


@pytest.fixture
def cluster() -> Iterator[None]:
    with local_cluster(2):
        yield


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about an option that nobody sets here
def test_what_is_wrong_with_the_input_is_tried_once_and_said_as_the_worker_said_it(
    cluster: None, tmp_path: Path
) -> None:
    task = Task(ray.remote(num_cpus=0)(FitQueue).remote(["one", "two"]), tmp_path / "starts")

    def loop(task: Task, device: str) -> None:
        with task.starts.open("a") as file:
            file.write("started\n")
        raise InputError("only 3 images, fewer than --batch-size 8")

    with pytest.raises(InputError, match=r"^only 3 images, fewer than --batch-size 8$"):
        train_group(loop, task, Workers(count=1, cpus=1.0, gpus=0.0), "test")
    assert task.starts.read_text() == "started\n"
    assert ray.get(task.queue.take.remote("0", "g"), timeout=30) is None  # nothing more is begun


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_one_of_connected_workers_meets_ends_the_others_too(cluster: None, tmp_path: Path) -> None:
    task = Task(ray.remote(num_cpus=0)(FitQueue).remote(["one"]), tmp_path / "starts")

    def loop(task: Task, device: str) -> None:
        if ray.train.get_context().get_world_rank() == 0:
            raise InputError("the weights are not on this machine")
        torch.distributed.barrier()  # for ever

    with pytest.raises(InputError, match=r"^the weights are not on this machine$"):
        train_group(loop, task, Workers(count=2, cpus=1.0, gpus=0.0), "test", connected=True)


def test_the_first_failure_counts_and_ends_the_queue() -> None:
    queue = FitQueue(["one", "two"])
    assert queue.take("0", "g") == "one"
    queue.fail(Failure("InputError", "first", ""))
    queue.fail(Failure("InputError", "second", ""))
    assert queue.take("1", "g") is None
    assert queue.failure() == Failure("InputError", "first", "")
