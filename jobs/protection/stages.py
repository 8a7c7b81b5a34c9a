"""embed, cluster, fit, apply, measure: the stages of a run, on its actors. Each skips what is done already."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from actors.assigner import FeatureReader, cluster_collection, write_assignments
from actors.cluster.batches import RunContext, Secret
from actors.cluster.connect import Workers, check_room, workers_for, workers_now
from actors.cluster.failures import ray_failures
from actors.cluster.metrics import recorder
from actors.cluster.stream import collected, over_shards
from actors.cluster.tasks import over_tasks
from actors.cluster.train_group import train_group
from actors.embedder import Embedder
from actors.fit_queue import FitQueue
from actors.fitter import TOGETHER, FitTask, fit_loop
from actors.measurer import measure_run
from actors.protector import Protector
from actors.sampler import FitImageReader, cluster_sizes
from actors.universal_protector import UniversalProtector
from jobs.protection.prepare import Run
from jobs.protection.profile import profiled
from jobs.shared.progress import progress
from pipeline import layout
from pipeline.clusters.clustering import Clustering, target_clusters
from pipeline.deltas.load import AnyProtection
from pipeline.fitting.assemble import clustering_from_bytes, clustering_to_bytes, fitted_protection, texture_protection
from pipeline.fitting.fit import FittedDeltas, merge
from pipeline.fitting.fit_images import fit_bytes, fit_shares, picture_side, shorter_sides
from pipeline.fitting.objective import PROXY_SIDES, delta_side
from pipeline.measures.estimate import count_samples
from pipeline.metrics import LAST_PROGRESS
from pipeline.settings import Settings, clusters_for
from pipeline.shards.samples import samples_of_all
from pipeline.storage.store import Store

CHUNK = 64  # shards that one short task looks at
JUDGED_BYTES = 2_000_000_000  # of images to fit on; every machine that holds a surrogate has room for less


def context_of(run: Run, workers: Workers) -> RunContext:
    """What the actors of a run need."""
    return RunContext(run.source, run.output, run.settings, run.plan.fingerprint, workers.threads, workers.device)


def embed(run: Run) -> None:
    """Features of every shard, one Parquet file each."""
    have = set(run.output.names(layout.FEATURES))
    left = [shard for shard in run.plan.shards if layout.features(shard.name) not in have]
    workers = workers_for(run.settings)
    with progress("embed", len(left), output=run.output) as bar, profiled(run, "embed") as profile:
        for done in over_shards(left, Embedder, (context_of(run, workers), run.given), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected, spent=done.work.spent())
            profile.add(done.work, done.images)


def cluster(run: Run) -> Clustering:
    """The clusters of the collection; the cluster of every image is written in one file per shard."""
    data = run.output.read_if_there(layout.CLUSTERING)
    if data is not None:
        return clustering_from_bytes(data)
    # with a given protection the embedder has already sent every image to the nearest of its centroids
    clustering = run.given.clustering if run.given is not None else _cluster(run)
    run.output.create(layout.CLUSTERING, clustering_to_bytes(clustering))
    return clustering


def _cluster(run: Run) -> Clustering:
    names = [shard.name for shard in run.plan.shards]
    with ray_failures(), progress("cluster", len(names), output=run.output) as bar:
        collection = cluster_collection(
            FeatureReader(run.output),
            names,
            run.settings.clusters,
            run.settings,
            run.surrogate.head,
            workers=workers_now(run.settings).on_cpus().count,
        )
        run.output.put(layout.CLUSTERS_REPORT, collection.report.to_bytes())
        for count in _in_chunks(write_assignments, run, names, ray.put(collection)):
            bar.step("assignments", units=count)
    return collection.clustering


def _in_chunks(task: Callable[..., Any], run: Run, names: list[str], *arguments: Any) -> Iterator[Any]:
    """Run a task over chunks of shards; yields its results as they come."""
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    for _, reference in over_tasks(task, [(run.output, chunk, *arguments) for chunk in chunks], cpus=0.5):
        yield ray.get(reference)


def apply(run: Run) -> None:
    """Protect every shard that has no commit yet, each in one transaction."""
    have = set(run.output.names(layout.COMMITS))
    left = [shard for shard in run.plan.shards if layout.commit(shard.name) not in have]
    actor: type = Protector
    workers = workers_for(run.settings)
    if not _needs_model(run):
        workers = workers.on_cpus()
    arguments: tuple[Any, ...] = (Secret(run.key),)
    if run.is_universal and run.given is not None:
        run.output.create(layout.PROTECTION, run.given.to_bytes())
        actor, arguments = UniversalProtector, ()
    with progress("apply", len(left), output=run.output) as bar, profiled(run, "apply") as profile:
        for done in over_shards(left, actor, (context_of(run, workers), *arguments), workers):
            bar.step(done.name, images=done.images, rejected=done.rejected, spent=done.work.spent())
            profile.add(done.work, done.images)


def _needs_model(run: Run) -> bool:
    """True if deltas are made image by image, by networks that run faster on a GPU."""
    generator = run.settings.generator if run.given is None else run.given.generator
    return generator in ("sample", "distilled", "universal")


def fit(run: Run, clustering: Clustering) -> None:
    """Fit the protection in Ray Train workers, one file per finished fit, then merge them into one."""
    if run.output.info(layout.PROTECTION) is not None:
        return
    protection: AnyProtection
    if run.given is not None:
        protection = run.given
    elif run.key is not None:
        protection = texture_protection(clustering, run.settings, run.surrogate.id, run.plan.fingerprint, run.key)
    else:
        units = _units(run.settings, len(clustering.centroids))
        _train(run, clustering, units)
        parts = [FittedDeltas.from_bytes(run.output.read(layout.fitted(unit))) for unit in units]
        protection = fitted_protection(merge(parts), clustering, run.settings, run.surrogate.id, run.plan.fingerprint)
    run.output.create(layout.PROTECTION, protection.to_bytes())


def check_fit_memory(run: Run) -> None:
    """Raise ClusterError, before anything is embedded, if the images to fit on do not fit into memory.

    Less than 2 GB are not judged, so that ordinary runs read nothing for this. Raises ClusterError as well if no worker
    can be placed: what does not start claims no output.
    """
    workers_for(run.settings)
    if run.given is not None or run.key is not None or run.output.info(layout.PROTECTION) is not None:
        return
    settings = run.settings
    largest = picture_side(settings, delta_side(settings, run.surrogate.input_size, [PROXY_SIDES[1]]))
    if settings.fit_images is not None and fit_bytes(settings.fit_images, largest) <= JUDGED_BYTES:
        return
    _, side = _sides(run)
    total = images_of_run(run)
    images = min(settings.fit_images or total, total)
    clusters = settings.clusters or clusters_for(images, settings.generator)
    workers = workers_now(settings, most=len(_units(settings, clusters))).count
    what = f"fitting on {images:,} images at {side} px (lower --fit-images or --workers)"
    with ray_failures():
        check_room(fit_bytes(images, side), workers, what)


def images_of_run(run: Run) -> int:
    """About how many images there are."""
    return max(1, count_samples(run.source, run.plan.shards, max_member_bytes=run.settings.max_member_bytes))


def _units(settings: Settings, num_clusters: int) -> list[str]:
    """What is fitted separately: every cluster, or all together through the proxy."""
    return [TOGETHER] if settings.optimise_through == "proxy" else [str(i) for i in range(num_clusters)]


def _train(run: Run, clustering: Clustering, units: list[str]) -> None:
    """Fit what has no file yet in a group of Ray Train workers that share a queue."""
    left = [unit for unit in units if run.output.info(layout.fitted(unit)) is None]
    if not left:
        return
    with ray_failures():
        task = _fit_task(run, clustering, left)
        workers = workers_now(run.settings, most=len(left))
        workers = replace(workers, cpus=min(workers.cpus, float(run.settings.fit_threads)))
        with watched(task.queue, len(left), run.output):
            train_group(fit_loop, task, workers, run.plan.fingerprint[:16])


def _fit_task(run: Run, clustering: Clustering, units: list[str]) -> FitTask:
    """Collect a hash-sample of pictures in the object store, and start the queue."""
    workers = workers_for(run.settings).on_cpus()
    side, image_side = _sides(run)
    shares = fit_shares(cluster_counts(run), run.settings.fit_images)
    context = context_of(run, workers)
    images = collected(run.plan.shards, FitImageReader, (context, image_side, shares), workers)
    targets = tuple(int(t) for t in target_clusters(clustering.feature_means, run.settings.permutation))
    context = context_of(run, workers_for(run.settings))
    queue = ray.remote(num_cpus=0)(FitQueue).remote(units)
    return FitTask(context, clustering, targets, images, queue, side, image_side)


def _sides(run: Run) -> tuple[int, int]:
    """Side of the deltas and of the pictures they are fitted on, in pixels."""
    side = delta_side(run.settings, run.surrogate.input_size, sides_of(run))
    return side, picture_side(run.settings, side)


def sides_of(run: Run) -> list[int]:
    """Shorter sides in pixels of the first 64 usable images."""
    samples = samples_of_all(run.source, run.plan.shards, max_member_bytes=run.settings.max_member_bytes)
    return shorter_sides(samples, limit=64, max_pixels=run.settings.max_pixels)


def cluster_counts(run: Run) -> dict[int, int]:
    """Images per cluster over the whole collection, counted by tasks."""
    total: Counter[int] = Counter()
    for part in _in_chunks(cluster_sizes, run, [shard.name for shard in run.plan.shards]):
        total.update(part)
    return dict(total)


@contextlib.contextmanager
def watched(queue: Any, num_units: int, output: Store | None = None, file: str = layout.PROGRESS) -> Iterator[None]:
    """Show the progress of the fits while the trainer blocks.

    output, file  see Progress
    """
    over = threading.Event()

    def watch() -> None:
        before = 0.0
        with progress("fit", 100 * num_units, "percent", output, file) as bar:
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
    """Measure what was written: a hash-sample of shards is decoded again."""
    with ray_failures():
        measure_run(context_of(run, workers_for(run.settings)), run.plan.shards, run.key)
