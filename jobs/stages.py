"""embed, cluster, fit, apply: Ray graphs made of actors. Each stage skips what an earlier start has left behind."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from actors.batches import RunContext, ShardDone, done_of, shard_rows
from actors.connect import Workers, workers_for
from actors.embedder import Embedder
from actors.fitter import TOGETHER, FitQueue, FitTask, fit_loop
from actors.protector import Protector
from actors.sampler import FitImageReader
from jobs.prepare import Run
from jobs.progress import progress
from pipeline import layout
from pipeline.errors import InputError, ScumbleError
from pipeline.records import Shard

RESTARTS = 3  # of one actor, and tries of one shard, before the run gives up


def context_of(run: Run, workers: Workers) -> RunContext:
    """What the run's actors are told."""
    return RunContext(run.source, run.output, run.settings, run.plan.fingerprint, workers.threads, workers.device)


def embed(run: Run) -> None:
    """Features of every shard, one Parquet file each."""
    have = {entry.name for entry in run.output.list(layout.FEATURES)}
    left = [shard for shard in run.plan.shards if layout.features(shard.name) not in have]
    workers = workers_for(run.settings)
    with progress("embed", len(left)) as bar:
        for done in over_shards(left, Embedder, (context_of(run, workers), run.protection), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected)


def apply(run: Run) -> None:
    """Protected shards: everything that has no commit yet goes through the shard transaction."""
    have = {entry.name for entry in run.output.list(layout.COMMITS)}
    left = [shard for shard in run.plan.shards if layout.commit(shard.name) not in have]
    workers = workers_for(run.settings).on_cpus()
    with progress("apply", len(left)) as bar:
        for done in over_shards(left, Protector, (context_of(run, workers), run.key), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected)


def over_shards(
    shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers
) -> Iterator[ShardDone]:
    """Send shards, one row each, through a bounded pool of actors; yields answers as they come."""
    for batch in _batches(shards, actor, arguments, workers):
        yield from done_of(batch)


def _dataset(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> Any:
    """One row is one block is one task: the unit of retry is the unit of commit."""
    rows = ray.data.from_items(shard_rows(shards), override_num_blocks=len(shards))
    return rows.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers.count, len(shards))),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )


def _batches(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> Iterator[Any]:
    if not shards:
        return
    with ray_failures():
        dataset = _dataset(shards, actor, arguments, workers)
        yield from dataset.iter_batches(batch_size=None, prefetch_batches=0)


@contextlib.contextmanager
def ray_failures() -> Iterator[None]:
    """Turn whatever Ray wraps around a failure back into the one line that it is."""
    try:
        yield
    except RayError as error:
        raise _our_own(error) from error
    except RuntimeError as error:
        if (ours := _found_in(error)) is not None:
            raise ours from error
        raise


def _our_own(error: BaseException) -> ScumbleError:
    ours = _found_in(error)
    if ours is not None:
        return ours
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return InputError(f"a worker failed: {line.strip()[:300]}; start the same command again, or add --debug")


def _found_in(error: BaseException | None) -> ScumbleError | None:
    """The first failure of ours in a chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ScumbleError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
