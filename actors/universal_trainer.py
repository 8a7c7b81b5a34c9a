"""Ray Train worker of One for All: trains one generator data-parallel, with checkpoints, and writes one file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from safetensors.torch import load, save

from actors.cluster.metrics import recorder
from actors.cluster.tasks import objects_of
from pipeline.metrics import STAGE_SECONDS
from pipeline.one_for_all.finish import bank_tensor, finished_protection
from pipeline.one_for_all.pictures import Squares, read_squares
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.one_for_all.training import TrainingImages, UniversalFit
from pipeline.records import Shard
from pipeline.shards.samples import samples_of
from pipeline.shards.squares import LeftOut
from pipeline.storage.store import Store
from pipeline.surrogates.concepts import ConceptBank
from pipeline.surrogates.surrogate import surrogate_for

UNIT = "generator"
ANSWER_SECONDS = 600.0
LOAD_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class UniversalTask:
    """What every worker needs.

    output   folder of the protection
    name     its file in that folder
    squares  references to Squares in the object store
    queue    handle of a FitQueue, which keeps the progress
    """

    settings: OneForAllSettings
    bank: ConceptBank
    fingerprint: str
    output: Store
    name: str
    squares: Sequence[Any]
    queue: Any
    threads: int

    @property
    def checkpoint(self) -> str:
        return f"{self.name}.{self.fingerprint[:16]}.checkpoint"


def unpacked_squares(
    store: Store, shards: Sequence[Shard], settings: OneForAllSettings, *, side: int, share: float
) -> tuple[list[Any], list[LeftOut]]:
    """References to the Squares of some shards, read by one task each, and what could not be read.

    Raises what a task raises, wrapped by Ray: InputError for a damaged shard.
    """
    task = ray.remote(_read).options(num_cpus=1, num_returns=2)
    reading = [task.remote(store, shard, settings, side, share) for shard in shards]
    told = ray.get([receipt for _, receipt in reading], timeout=LOAD_SECONDS)
    return [squares for squares, _ in reading], [left_out for receipt in told for left_out in receipt]


def _read(
    store: Store, shard: Shard, settings: OneForAllSettings, side: int, share: float
) -> tuple[Squares, tuple[LeftOut, ...]]:
    squares = read_squares(
        samples_of(store, shard, max_member_bytes=settings.max_member_bytes, any_version=True),
        shard.name,
        f"{store.url}/{shard.name}",
        side=side,
        share=share,
        seed=settings.seed,
        max_pixels=settings.max_pixels,
        with_labels=settings.select_by == "label",
    )
    return squares, squares.left_out


def universal_loop(task: UniversalTask, device: str) -> None:
    """The loop of every worker: all take the same steps; the first writes checkpoints and the file."""
    torch.set_num_threads(task.threads)
    is_first = ray.train.get_context().get_world_rank() == 0
    surrogate = surrogate_for(task.settings, device)
    fit = UniversalFit(_images(task), surrogate, bank_tensor(task.bank), task.settings, str(surrogate.device))
    if (saved_state := task.output.read_if_there(task.checkpoint)) is not None:
        fit.load(load(saved_state))
    metrics, saved = recorder(), time.monotonic()
    while not fit.is_done:
        started = time.monotonic()
        fit.advance(5)
        metrics.record(STAGE_SECONDS, time.monotonic() - started, stage="fit", step="model")
        if is_first:
            ray.get(task.queue.tell.remote(UNIT, min(fit.progress, 0.999)), timeout=ANSWER_SECONDS)
            if time.monotonic() - saved > task.settings.checkpoint_every:
                task.output.put(task.checkpoint, save(fit.state()))
                saved = time.monotonic()
    if is_first:
        task.output.put(task.name, finished_protection(fit, task.bank, task.fingerprint).to_bytes())
        task.output.delete([task.checkpoint])


def _images(task: UniversalTask) -> TrainingImages:
    parts: list[Squares] = objects_of(task.squares)
    pixels = torch.from_numpy(np.concatenate([part.pixels for part in parts]))
    labels = [part.labels for part in parts if part.labels is not None]
    return TrainingImages(pixels, torch.from_numpy(np.concatenate(labels)) if labels else None)
