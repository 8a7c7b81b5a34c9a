"""Settings for training a universal generator: ranges and defaults. Knows nothing of flags or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.deltas.universal.shape import BLOCKS, STRIDE, WIDTH, Bound
from pipeline.settings import (
    DEFAULT_SURROGATE,
    LARGEST_EPSILON,
    Deciding,
    check,
    check_choice,
    check_least,
    runtime,
    settings_of_kind,
)

Loss = Literal["logratio", "paper_detached", "fixed_lambda", "code_pairs", "code_diag"]  # pipeline.one_for_all.losses
SelectBy = Literal["clean_embedding", "perturbed_embedding", "label"]
NEAR = 5  # Chen et al. 2024, section 4.5


@dataclass(frozen=True, kw_only=True)
class OneForAllSettings(Deciding):
    """All settings of a training. Defaults follow the paper where it gives them (section 4.1).

    side        of the images the generator sees, in pixels; None: the surrogate's input, rounded up to a multiple of 8
    concepts    a concept bank: `head` (the classifier's own classes), a text file of names for the surrogate's text
                tower, `imagenet`, `cifar100` or `pets` (built-in names), or a safetensors bank; None: head if there is
                one, else imagenet
    batch_size  images per step over all workers
    accumulate  number of parts in which a step is computed
    checkpoint_every  seconds between checkpoints; one of the paper's generator with its optimiser takes 1.5 GB
    Raises SettingsError, one line that names the option, for anything out of range.
    """

    input: str = runtime("")
    output: str = runtime("")
    surrogate: str = DEFAULT_SURROGATE
    surrogate_weights: str | None = runtime(None)
    surrogate_size: int | None = None
    concepts: str | None = None
    epsilon: float = 8 / 255
    bound: Bound = "eps_tanh"
    loss: Loss = "logratio"
    select_by: SelectBy = "clean_embedding"
    near: int = NEAR
    width: int = WIDTH
    blocks: int = BLOCKS
    side: int | None = None
    images: int | None = None
    epochs: int = 200
    max_steps: int = 100_000
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    seed: int = 0
    max_pixels: int = 100_000_000
    max_member_bytes: int = 256 * 1024 * 1024
    checkpoint_every: float = runtime(60.0)
    workers: int | None = runtime(None)
    gpus_per_worker: float = runtime(0.0)
    overwrite: bool = runtime(False)
    dry_run: bool = runtime(False)
    debug: bool = runtime(False)

    def __post_init__(self) -> None:
        for name, allowed in {"bound": Bound, "loss": Loss, "select_by": SelectBy}.items():
            check_choice(name, getattr(self, name), get_args(allowed))
        check(
            1 / 255 <= self.epsilon <= LARGEST_EPSILON,
            f"--epsilon must be between 1/255 and 127/255; it is {self.epsilon:g}",
        )
        check_least(self, _LEAST)
        check(
            self.side is None or self.side % STRIDE == 0,
            f"--side must be a multiple of {STRIDE}: the generator halves it three times; it is {self.side}",
        )
        check(
            self.batch_size % self.accumulate == 0,
            f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}",
        )
        whole = self.gpus_per_worker == int(self.gpus_per_worker)
        check(whole or self.workers == 1, "--gpus-per-worker: workers that share a GPU cannot train together; use 1")

    def side_for(self, input_size: int) -> int:
        """Side of the generator's images: as given, else the surrogate's input rounded up to a multiple of 8."""
        return self.side or -(-input_size // STRIDE) * STRIDE

    def steps_for(self, images: int) -> int:
        """Optimiser steps on so many images; 0 if they are fewer than a batch."""
        return min(self.max_steps, self.epochs * (images // self.batch_size))


def one_for_all_settings(given: Mapping[str, Any]) -> OneForAllSettings:
    """Settings from options. Raises SettingsError for unknown names, with near matches, and for missing ones."""
    return settings_of_kind(OneForAllSettings, given, required=("input", "output"))


_LEAST = {
    "surrogate_size": 32,
    "near": 1,
    "width": 1,
    "blocks": 1,
    "side": 16,
    "images": 2,
    "epochs": 1,
    "max_steps": 1,
    "batch_size": 2,
    "accumulate": 1,
    "lr": 0,
    "weight_decay": 0,
    "max_pixels": 1,
    "max_member_bytes": 1,
    "checkpoint_every": 0,
    "workers": 1,
    "gpus_per_worker": 0,
}
