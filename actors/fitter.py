"""Ray Train worker: takes the next free fit and writes a file.

A fit is the generator of one cluster, or "all" where the deltas are fitted together through the proxy. Whatever is
killed, a finished fit is a file and is never repeated, and an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from safetensors.torch import load, save

from actors.cluster.batches import RunContext
from actors.cluster.metrics import recorder
from actors.cluster.tasks import objects_of
from pipeline import layout
from pipeline.clusters.clustering import Clustering
from pipeline.fitting.cluster_fit import Aims, ClusterFit
from pipeline.fitting.direct_fit import ProxyFit
from pipeline.fitting.distilled_fit import DistilledFit
from pipeline.fitting.fit import Fit, FitImages, fit_images_from
from pipeline.fitting.sample_fit import SampleFit
from pipeline.metrics import STAGE_SECONDS
from pipeline.surrogates.surrogate import Surrogate, surrogate_for

TOGETHER = "all"
CHECKPOINT_SECONDS = 20.0
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class FitTask:
    """What a worker needs besides the context of the run."""

    context: RunContext
    clustering: Clustering
    targets: tuple[int, ...]
    images: list[Any]  # references to Arrow tables of pictures in the object store
    queue: Any  # handle of a FitQueue
    side: int
    image_side: int


def fit_loop(task: FitTask, device: str) -> None:
    """The loop of every Ray Train worker: take a fit, write its file, until none is left."""
    torch.set_num_threads(task.context.settings.fit_threads)
    worker = ray.train.get_context()
    name, group = str(worker.get_world_rank()), _group_name()
    images: FitImages | None = None
    while (unit := _ask(task.queue.take.remote(name, group))) is not None:
        if task.context.output.info(layout.fitted(unit)) is None:
            images = images or fit_images_from(_tables(task.images), side=task.image_side)
            _fit_unit(unit, task, images, device)
        _ask(task.queue.tell.remote(unit, 1.0))


def _group_name() -> str:
    """One name for all workers of a group; a restarted group has a new one."""
    return str(ray.get_runtime_context().get_placement_group_id())


def _ask(reference: Any) -> Any:
    return ray.get(reference, timeout=ANSWER_SECONDS)


def _tables(references: list[Any]) -> list[pa.Table]:
    return [table for table in objects_of(references) if table.num_rows]


def _fit_unit(unit: str, task: FitTask, images: FitImages, device: str) -> None:
    """Fit one unit, with checkpoints in the store, and publish the finished file."""
    output, checkpoint = task.context.output, layout.fit_checkpoint(unit)
    fit = _start(unit, task, images, device)
    if (saved_state := output.read_if_there(checkpoint)) is not None:
        fit.load(load(saved_state))
    metrics, saved = recorder(), time.monotonic()
    while not fit.is_done:
        started = time.monotonic()
        fit.advance(5)
        metrics.record(STAGE_SECONDS, time.monotonic() - started, stage="fit", step="model")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            output.put(checkpoint, save(fit.state()))
            saved = time.monotonic()
        task.queue.tell.remote(unit, min(fit.progress, 0.999))
    output.create(layout.fitted(unit), fit.result().to_bytes())
    output.delete([checkpoint])


def _start(unit: str, task: FitTask, images: FitImages, device: str) -> Fit:
    settings = task.context.settings
    if settings.generator == "sample":
        return SampleFit(images, len(task.targets), settings, device)
    if settings.generator == "distilled":
        return DistilledFit(images, len(task.targets), settings, device)
    if unit == TOGETHER:
        return ProxyFit(images, len(task.targets), settings, device)
    aims = Aims(torch.from_numpy(task.clustering.feature_means.copy()), task.targets)
    return ClusterFit(int(unit), images, _surrogate(task.context, device), aims, settings, device, side=task.side)


_LOADED: dict[str, Surrogate] = {}


def _surrogate(context: RunContext, device: str) -> Surrogate:
    """The surrogate, loaded once per worker process."""
    if device not in _LOADED:
        _LOADED[device] = surrogate_for(context.settings, device)
    return _LOADED[device]
