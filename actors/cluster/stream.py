"""Stream shards through a pool of Ray Data actors: results as they come, failures as data, lost shards again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from actors.cluster.attendance import Book, Patience, signing, until_answered
from actors.cluster.batches import Batch, ShardDone, done_of, shard_rows
from actors.cluster.connect import check_placeable
from actors.cluster.placement import Workers
from pipeline.records import Shard

PLACED_SECONDS = 15.0  # without a heartbeat, after which the autoscaler is asked if a worker can be placed at all
RESTARTS = 3  # of one actor, so of a shard that kills it, before the run gives up
SHARE = 4_000  # a block takes 1/SHARE of the remaining shards: few blocks, and single shards at the end

_T = TypeVar("_T")


class Attended:
    """Ray Data actor around an actor of a stage: signs while that one is busy, and reports what it raises."""

    def __init__(self, book: Book, every_s: float, actor: type, arguments: tuple[Any, ...]) -> None:
        self._book, self._every_s = book, every_s
        self._error: Exception | None = None
        try:
            with signing(book, "", every_s):
                self._actor = actor(*arguments)
        except Exception as error:  # raised here, Ray would print its traceback and restart the actor
            self._error = error

    def __call__(self, batch: Batch) -> Any:
        if self._error is not None:
            raise self._error
        with signing(self._book, str(batch["name"][0]), self._every_s):
            return self._actor(batch)


class _Watch(ExecutionCallback):  # type: ignore[misc]
    """Ends an execution in which no worker is busy, or can ever be; a timeout alone would end slow ones too."""

    def __init__(self, book: Book, seconds: float, workers: Workers) -> None:
        self._patience, self._workers = Patience(book, seconds), workers

    def on_execution_step(self, executor: Any) -> None:
        if self._patience.check() > PLACED_SECONDS:
            check_placeable(self._workers)


def over_shards(
    shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers
) -> Iterator[ShardDone]:
    """Send shards through one pool of actors, which grows as nodes join; yields results one by one as they come.

    Raises the ScumbleError that a worker has reported, else ClusterError.
    """
    left = {shard.name: shard for shard in shards}

    def answers(dataset: Any) -> Iterator[ShardDone]:
        dataset.context.target_max_block_size = 1  # each result is a block of its own and waits for no other
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for done in done_of(batch):
                if left.pop(done.name, None) is not None:  # a restarted actor may answer twice
                    yield done

    yield from _until_answered(left, actor, arguments, workers, answers)


def collected(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> list[Any]:
    """Like over_shards, but the results, Arrow tables in any order, stay in Ray's object store; returns references."""
    left = {shard.name: shard for shard in shards}

    def tables(dataset: Any) -> Iterator[Any]:
        # materialize() asks every process for its memory afterwards, and waits for those that do not answer
        references = [reference for bundle in dataset.iter_internal_ref_bundles() for reference in bundle.block_refs]
        left.clear()
        yield from references

    return list(_until_answered(left, actor, arguments, workers, tables))


def _until_answered(
    left: dict[str, Shard],
    actor: type,
    arguments: tuple[Any, ...],
    workers: Workers,
    answers: Callable[[Any], Iterator[_T]],
) -> Iterator[_T]:
    """Run one pool until `answers` has taken every shard out of `left`; start another for what is lost.

    An actor may process a shard twice, at any time, but publishes it once.
    """
    if not left:
        return

    def ask(book: Book, patience_s: float, every_s: float) -> Iterator[_T]:
        dataset = _dataset(list(left.values()), actor, (book, every_s, actor, arguments), workers)
        dataset.context.custom_execution_callback_classes = [partial(_Watch, book, patience_s, workers)]
        yield from answers(dataset)

    yield from until_answered(left, "shards", ask)


def block_sizes(count: int) -> list[int]:
    """Shards per block, ever fewer: few blocks for many shards, and yet no worker ends long after the others.

    Source: guided self-scheduling, Polychronopoulos and Kuck, IEEE Transactions on Computers 1987.
    """
    sizes = []
    while count:
        sizes.append(max(1, count // SHARE))
        count -= sizes[-1]
    return sizes


def _dataset(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> Any:
    """One row is one shard, the unit of commit; one block is one task."""
    rows, start, blocks = pa.Table.from_pylist(shard_rows(shards)), 0, []
    for size in block_sizes(len(shards)):
        blocks.append(rows.slice(start, size))
        start += size
    # Ray 2.60 deprecates free-form options, but names no other way to bound restarts, and unbounded is its default.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=DeprecationWarning)
    first = min(workers.count, len(blocks))
    return ray.data.from_blocks(blocks).map_batches(
        type(actor.__name__, (Attended,), {}),  # names its processes after what they do
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=first, max_size=max(first, min(workers.most, len(blocks)))),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        max_restarts=RESTARTS,
        max_task_retries=-1,  # a lost node answers no call until the cluster knows; restarts are what is bounded
    )
