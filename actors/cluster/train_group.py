"""A group of Ray Train workers that run one loop to its end, even if some of them die."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from actors.cluster.placement import Workers

RESTARTS = 3  # of the whole group


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to the job: Ray's own handler, once installed, ends the process with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        return


def train_group(loop: Callable[[dict[str, Any]], None], task: Any, workers: Workers, name: str) -> None:
    """Run `loop` with {"task": task} in every worker, until all are done. Raises what Ray Train raises."""
    with tempfile.TemporaryDirectory(prefix="scumble-train-") as scratch:
        _Trainer(
            loop,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=workers.count,
                use_gpu=bool(workers.gpus),
                resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            ),
            run_config=RunConfig(name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS)),
        ).fit()
