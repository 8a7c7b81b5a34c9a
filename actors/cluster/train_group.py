"""A group of Ray Train workers that run one loop to its end, even if some of them die.

What would fail again in the same way is no reason to start the group again: the queue of the task keeps it, and the
loop ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from actors.cluster.failures import Failure
from actors.cluster.placement import Workers
from pipeline.errors import ConflictError, InputError, SettingsError

RESTARTS = 3  # of the whole group
ANSWER_SECONDS = 60.0
_LASTING = (InputError, SettingsError, ConflictError)  # all workers of a group meet these, or one has the last word


class _Quiet(DataParallelTrainer):  # type: ignore[misc]
    """Starts no process that nothing here needs, and leaves Ctrl-C to the job.

    Ray's own handler of Ctrl-C, once installed, ends the process with exit code 0.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = {"DatasetsCallback"}  # an actor that hands out data sets: workers are given none
        if "RAY_ADDRESS" not in os.environ:
            unneeded.add("PlacementGroupCleanerCallback")  # of a driver that died: a private cluster goes with it
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in unneeded]

    def _register_sigint_handler(self, controller: Any) -> None:
        return


class _Connected(_Quiet, TorchTrainer):  # type: ignore[misc]
    """With a process group of torch, which Ray's controller loads torch for."""


def train_group(
    loop: Callable[[Any, str], None], task: Any, workers: Workers, name: str, *, connected: bool = False
) -> None:
    """Run `loop` with the task and a torch device in every worker, until all are done.

    task       has the handle of a FitQueue as `queue`
    connected  the workers train one network together; otherwise none knows of the others
    Raises what a worker raised and would raise again, at once; otherwise what Ray Train raises.
    """
    trainer = _Connected if connected else _Quiet
    with tempfile.TemporaryDirectory(prefix="scumble-train-") as scratch:
        training = trainer(  # the task is bound to the loop: Ray's controller would load what it is made of
            partial(_connected if connected else _apart, loop, task, workers.device),
            scaling_config=ScalingConfig(
                num_workers=workers.count,
                use_gpu=bool(workers.gpus),
                resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            ),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS)),
        )
        try:
            training.fit()
        except TrainingFailedError:
            _raise_lasting(task)
            raise
    _raise_lasting(task)


def _raise_lasting(task: Any) -> None:
    failure: Failure | None = ray.get(task.queue.failure.remote(), timeout=ANSWER_SECONDS)
    if failure is not None:
        raise failure.error()


def _apart(loop: Callable[[Any, str], None], task: Any, device: str) -> None:
    """The loop, which keeps a lasting failure in the queue and ends well, so that the group is not started again."""
    try:
        loop(task, device)
    except _LASTING as error:
        ray.get(task.queue.fail.remote(Failure.of(error, "")), timeout=ANSWER_SECONDS)


def _connected(loop: Callable[[Any, str], None], task: Any, device: str) -> None:
    """The same where the others wait for this worker: it ends badly, which ends them; started again, all end well."""
    if ray.get(task.queue.failure.remote(), timeout=ANSWER_SECONDS) is not None:
        return
    try:
        loop(task, str(ray.train.torch.get_device()))  # torch's process group has chosen one
    except _LASTING as error:
        ray.get(task.queue.fail.remote(Failure.of(error, "")), timeout=ANSWER_SECONDS)
        raise
