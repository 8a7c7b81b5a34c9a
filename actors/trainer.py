"""Ray Train's group of workers, as jobs start it."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to the job: Ray's own handler, which stays for good, would end the process with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        return
