"""embed, cluster, fit, apply: Ray graphs made of actors. Each stage skips what an earlier start has left behind."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig

from actors.assigner import FeatureReader, cluster_collection, write_assignments
from actors.batches import RunContext, Secret, ShardDone, done_of, shard_rows
from actors.connect import Workers, cpus_of_a_node, workers_for
from actors.embedder import Embedder
from actors.fit_queue import FitQueue
from actors.fitter import TOGETHER, FitTask, fit_loop
from actors.measurer import measure_run
from actors.metrics import recorder
from actors.protector import Protector
from actors.sampler import FitImageReader, cluster_sizes
from actors.trainer import Trainer
from actors.universal_protector import UniversalProtector
from jobs.prepare import Run
from jobs.profiled import profiled
from jobs.progress import progress
from pipeline import errors, layout
from pipeline.assemble import clustering_from_bytes, clustering_to_bytes, fitted_protection, texture_protection
from pipeline.clusters import Clustering, target_clusters
from pipeline.errors import InputError, ScumbleError
from pipeline.fit_images import fit_shares, picture_side, shorter_sides
from pipeline.fitted import FittedDeltas, merge
from pipeline.metrics import LAST_PROGRESS
from pipeline.objective import delta_side
from pipeline.records import Shard
from pipeline.settings import Settings
from pipeline.tar import read_samples

CHUNK = 64  # shards that one short task looks at
WAVE = 10_000  # shards that one graph of Ray Data is made of: the driver holds a block for each
ANSWER_SECONDS = 3600.0
PATIENCE_SECONDS, PATIENCE_BYTES_PER_SECOND = 180.0, 100_000.0  # a start of all actors; the slowest model on a CPU
_OURS = re.compile(r"\bpipeline\.errors\.(\w+): (.+)")
_T = TypeVar("_T")
RESTARTS = 3  # of one actor, and so of one shard that kills it, before the run gives up


def context_of(run: Run, workers: Workers) -> RunContext:
    """What the run's actors are told."""
    return RunContext(run.source, run.output, run.settings, run.plan.fingerprint, workers.threads, workers.device)


def embed(run: Run) -> None:
    """Features of every shard, one Parquet file each."""
    have = set(run.output.names(layout.FEATURES))
    left = [shard for shard in run.plan.shards if layout.features(shard.name) not in have]
    workers = workers_for(run.settings)
    with progress("embed", len(left)) as bar, profiled(run, "embed") as profile:
        for done in over_shards(left, Embedder, (context_of(run, workers), run.protection), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected)
            profile.add(done.work, done.images)


def cluster(run: Run) -> Clustering:
    """The clusters of the collection, and the cluster of every image, one file per shard."""
    if run.output.info(layout.CLUSTERING) is not None:
        return clustering_from_bytes(run.output.read(layout.CLUSTERING))
    # with a given protection the embedder has already sent every image to the nearest of its centroids
    clustering = run.protection.clustering if run.protection is not None else _cluster(run)
    run.output.create(layout.CLUSTERING, clustering_to_bytes(clustering))
    return clustering


def _cluster(run: Run) -> Clustering:
    names = [shard.name for shard in run.plan.shards]
    with ray_failures(), progress("cluster", len(names)) as bar:
        collection = cluster_collection(
            FeatureReader(run.output),
            names,
            run.settings.clusters,
            run.settings,
            run.surrogate.head,
            workers=workers_for(run.settings).on_cpus().count,
        )
        run.output.put(layout.CLUSTERS_REPORT, collection.report.to_bytes())
        for count in _in_chunks(write_assignments, run, names, ray.put(collection)):
            bar.step("assignments", units=count)
    return collection.clustering


def _in_chunks(task: Callable[..., Any], run: Run, names: list[str], *arguments: Any) -> Iterator[Any]:
    """Run a task over chunks of shards; yields answers in order."""
    remote = ray.remote(task).options(num_cpus=0.5)
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    for reference in [remote.remote(run.output, chunk, *arguments) for chunk in chunks]:
        yield ray.get(reference, timeout=ANSWER_SECONDS)


def apply(run: Run) -> None:
    """Protected shards: everything that has no commit yet goes through the shard transaction."""
    have = set(run.output.names(layout.COMMITS))
    left = [shard for shard in run.plan.shards if layout.commit(shard.name) not in have]
    actor: type = Protector
    workers = workers_for(run.settings).on_cpus()
    arguments: tuple[Any, ...] = (Secret(run.key),)
    if run.universal is not None:
        run.output.create(layout.PROTECTION, run.universal.to_bytes())
        actor, workers, arguments = UniversalProtector, workers_for(run.settings), ()
    with progress("apply", len(left)) as bar, profiled(run, "apply") as profile:
        for done in over_shards(left, actor, (context_of(run, workers), *arguments), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected)
            profile.add(done.work, done.images)


def fit(run: Run, clustering: Clustering) -> None:
    """The protection: fitted in Ray Train workers, one file per finished fit, then united into one file."""
    if run.output.info(layout.PROTECTION) is not None:
        return
    if run.protection is not None:
        protection = run.protection
    elif run.key is not None:
        protection = texture_protection(clustering, run.settings, run.surrogate.id, run.plan.fingerprint, run.key)
    else:
        units = _units(run.settings, len(clustering.centroids))
        _train(run, clustering, units)
        parts = [FittedDeltas.from_bytes(run.output.read(layout.fitted(unit))) for unit in units]
        protection = fitted_protection(merge(parts), clustering, run.settings, run.surrogate.id, run.plan.fingerprint)
    run.output.create(layout.PROTECTION, protection.to_bytes())


def _units(settings: Settings, num_clusters: int) -> list[str]:
    """What is fitted on its own: every cluster, or all together through the proxy."""
    return [TOGETHER] if settings.optimise_through == "proxy" else [str(i) for i in range(num_clusters)]


def _train(run: Run, clustering: Clustering, units: list[str]) -> None:
    """Fit what has no file yet in a group of Ray Train workers that take from one queue."""
    left = [unit for unit in units if run.output.info(layout.fitted(unit)) is None]
    if not left:
        return
    with ray_failures():
        task = _fit_task(run, clustering, left)
        workers = workers_for(run.settings)
        count = min(workers.count, len(left))
        cpus = min(workers.cpus * workers.count // count, float(run.settings.fit_threads), cpus_of_a_node())
        with tempfile.TemporaryDirectory(prefix="scumble-train-") as scratch, watched(task.queue, len(left)):
            Trainer(
                fit_loop,
                train_loop_config={"task": task},
                scaling_config=ScalingConfig(
                    num_workers=count,
                    use_gpu=bool(workers.gpus),
                    resources_per_worker={"CPU": cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
                ),
                run_config=RunConfig(
                    name=run.plan.fingerprint[:16],
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=RESTARTS),
                ),
            ).fit()


def _fit_task(run: Run, clustering: Clustering, units: list[str]) -> FitTask:
    """Gather the hash-sample of pictures in the object store, and start the queue."""
    workers = workers_for(run.settings).on_cpus()
    side, image_side = _sides(run)
    shares = fit_shares(_cluster_sizes(run), run.settings.fit_images)
    context = context_of(run, workers)
    images = _collected(run.plan.shards, FitImageReader, (context, image_side, shares), workers)
    targets = tuple(int(t) for t in target_clusters(clustering.feature_means, run.settings.permutation))
    context = context_of(run, workers_for(run.settings))
    queue = ray.remote(num_cpus=0)(FitQueue).remote(units)
    return FitTask(context, clustering, targets, images, queue, side, image_side)


def _sides(run: Run) -> tuple[int, int]:
    """Side of the deltas and of the pictures they are fitted on, in pixels."""
    first = run.plan.shards[0]
    with run.source.open(first.name) as stream:
        samples = read_samples(stream, max_member_bytes=run.settings.max_member_bytes)
        sides = shorter_sides(samples, limit=64, max_pixels=run.settings.max_pixels)
    side = delta_side(run.settings, run.surrogate.input_size, sides)
    return side, picture_side(run.settings, side)


def _cluster_sizes(run: Run) -> dict[int, int]:
    """Images per cluster over the whole collection, counted by tasks where the assignments are."""
    total: Counter[int] = Counter()
    for part in _in_chunks(cluster_sizes, run, [shard.name for shard in run.plan.shards]):
        total.update(part)
    return dict(total)


@contextlib.contextmanager
def watched(queue: Any, num_units: int) -> Iterator[None]:
    """Show how far the fits are while the trainer blocks."""
    over = threading.Event()

    def watch() -> None:
        before = 0.0
        with progress("fit", 100 * num_units, "percent") as bar:
            while not over.wait(1.0):
                with contextlib.suppress(RayError):
                    shares = ray.get(queue.progress.remote(), timeout=30)
                    done = int(100 * sum(shares.values()))
                    if sum(shares.values()) > before:
                        before = sum(shares.values())
                        recorder().record(LAST_PROGRESS, time.time())
                    if done - bar.done >= (1 if sys.stderr.isatty() else 10 * num_units):
                        bar.step(f"{100 * sum(shares.values()) / num_units:.0f}", units=done - bar.done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=35)


def measure(run: Run) -> None:
    """Figures of what was written: a hash-sample of shards is decoded again."""
    with ray_failures():
        measure_run(context_of(run, workers_for(run.settings)), [shard.name for shard in run.plan.shards], run.key)


def over_shards(
    shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers
) -> Iterator[ShardDone]:
    """Send shards, one row each, through a bounded pool of actors; yields answers as they come."""
    left = {shard.name: shard for shard in shards}

    def answers(dataset: Any, _: Sequence[Shard]) -> Iterator[ShardDone]:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for done in done_of(batch):
                del left[done.name]
                yield done

    yield from _until_answered(left, actor, arguments, workers, answers)


def _collected(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> list[Any]:
    """As over_shards, but the answers, Arrow tables in any order, stay in Ray's object store: references to them."""
    left = {shard.name: shard for shard in shards}

    def tables(dataset: Any, wave: Sequence[Shard]) -> Iterator[Any]:
        references = dataset.materialize().to_arrow_refs()
        for shard in wave:
            del left[shard.name]
        yield from references

    return list(_until_answered(left, actor, arguments, workers, tables))


def _until_answered(
    left: dict[str, Shard],
    actor: type,
    arguments: tuple[Any, ...],
    workers: Workers,
    answers: Callable[[Any, Sequence[Shard]], Iterator[_T]],
) -> Iterator[_T]:
    """Wave by wave, until `answers` has taken every shard out of `left`.

    Ray can lose an answer for good when a node is cut off for a moment. What stays away too long is asked for again:
    an actor may do a shard twice, at any time, and publishes it once.
    """
    patience = patience_for(list(left.values()))
    while left:
        wave = list(islice(left.values(), WAVE))
        try:
            with ray_failures():
                dataset = _dataset(wave, actor, arguments, workers)
                dataset.context.execution_no_progress_timeout_s = patience
                yield from answers(dataset, wave)
        except ExecutionTimeoutError:
            again = f"asking again for the {len(left):,} shards that are left"
            print(f"warning: no answer from any worker for {patience:.0f} s; {again}", file=sys.stderr, flush=True)
            patience *= 2  # was it only slow, or waiting for machines, then it will get its time


def patience_for(shards: Sequence[Shard]) -> float:
    """Seconds without any answer after which a stage no longer believes that one will come."""
    return PATIENCE_SECONDS + max((shard.size for shard in shards), default=0) / PATIENCE_BYTES_PER_SECOND


def _dataset(shards: Sequence[Shard], actor: type, arguments: tuple[Any, ...], workers: Workers) -> Any:
    """One row is one block is one task: the unit of retry is the unit of commit."""
    rows = ray.data.from_items(shard_rows(shards), override_num_blocks=len(shards))
    # Ray 2.60 deprecates free-form options, but names no other way to bound restarts, and unbounded is its default.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=DeprecationWarning)
    return rows.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers.count, len(shards))),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        max_restarts=RESTARTS,
        max_task_retries=-1,  # a lost node answers no call until the cluster knows; restarts are what is bounded
    )


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
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__).strip()
    if isinstance(error, RayActorError | OutOfMemoryError):
        return InputError(
            f"a worker process died too often ({line.partition('. ')[0].rstrip('.')[:120]}), most often for want of "
            "memory: give it more, or choose fewer --workers, then start the same command again"
        )
    return InputError(f"a worker failed: {line[:300]}; start the same command again, or add --debug")


def _found_in(error: BaseException | None) -> ScumbleError | None:
    """The first failure of ours in a chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ScumbleError):
            return error
        if isinstance(error, RayError) and (ours := _told_by(str(error))) is not None:
            return ours
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _told_by(text: str) -> ScumbleError | None:
    """The failure of ours that a traceback ends with: of what an actor raised, Ray Data sends the text alone."""
    for name, message in reversed(_OURS.findall(text)):
        made = getattr(errors, name, None)
        if isinstance(made, type) and issubclass(made, ScumbleError):
            return made(message.strip())
    return None
