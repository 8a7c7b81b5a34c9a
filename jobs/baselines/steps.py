"""The steps of a baseline's run that differ from those of `protect_imagenet`: labels, deltas, and what is checked."""

from __future__ import annotations

from dataclasses import replace

import ray

from actors.baselines.fitter import UNIT, BaselineTask, baseline_loop, write_keyed
from actors.baselines.labeller import Labeller
from actors.cluster.connect import check_room, workers_for, workers_now
from actors.cluster.failures import ray_failures
from actors.cluster.stream import collected, over_shards
from actors.cluster.train_group import train_group
from actors.fit_queue import FitQueue
from actors.sampler import FitImageReader
from jobs.protection.dry_run import looked_at, nothing_left, print_files, print_time
from jobs.protection.prepare import Run, prepare
from jobs.protection.stages import cluster, cluster_counts, context_of, images_of_run, sides_of, watched
from jobs.shared.progress import progress
from pipeline import layout
from pipeline.baselines.base import BaselineSettings
from pipeline.baselines.fit import baseline_bytes, baseline_protection, baseline_side
from pipeline.baselines.given import GivenDeltas
from pipeline.baselines.labels import label_clustering
from pipeline.baselines.methods import BASELINES, baseline
from pipeline.baselines.settings import EMBEDDED, BaselineRunSettings
from pipeline.baselines.trained.fitted import SurrogateBaseline
from pipeline.clusters.clustering import Clustering
from pipeline.errors import InputError, SettingsError
from pipeline.fitting.fit_images import LEAST_PER_CLUSTER, fit_shares
from pipeline.measures.cpus import available_cpus
from pipeline.measures.estimate import estimate_writing, torch_threads
from pipeline.relearning.labels.given import Classes, class_numbers
from pipeline.report.page import size as as_bytes
from pipeline.settings import clusters_for
from pipeline.surrogates.features import assignment_from_parquet


def prepare_baseline(settings: BaselineRunSettings) -> Run:
    """As prepare; refuses deltas that cannot be used, and predicted labels of a surrogate that predicts none."""
    if settings.deltas is not None:
        given = GivenDeltas(settings.deltas)
        given.check(settings.epsilon)
        settings = replace(settings, deltas_sha256=given.sha256)
    run = prepare(settings)
    true_classes(run)
    if settings.labels == "predicted" and run.surrogate.head is None:
        raise SettingsError(f"--labels predicted: {settings.surrogate} has no classifier; choose another --surrogate")
    return run


def true_classes(run: Run) -> Classes | None:
    """What true labels are, as class_numbers; None for other labels. Raises InputError for images without a label."""
    settings = _settings(run)
    return class_numbers({settings.input: run.plan.shards}) if settings.labels == "true" else None


def _settings(run: Run) -> BaselineRunSettings:
    assert isinstance(run.settings, BaselineRunSettings)
    return run.settings


def print_baseline(run: Run) -> None:
    """The plan of --dry-run: a few images are measured on this machine, and nothing is written."""
    settings, side = _settings(run), _side(run)
    if nothing_left(run):
        return
    surrogate = run.surrogate if settings.labels in EMBEDDED else None
    predicted = estimate_writing(*looked_at(run), surrogate, settings)
    predicted = replace(predicted, fit=_most_fit_seconds(run))
    print(f"images       about {predicted.images:,}, labels {settings.labels}")
    if settings.deltas is not None:
        print(f"method       {len(GivenDeltas(settings.deltas).keys):,} deltas of {settings.deltas}")
    else:
        print(f"method       {settings.method}: {BASELINES[settings.method].about}; at {side} px")
        memory = baseline_bytes(_fitted_images(run), side)
        print(f"memory       about {as_bytes(memory)} in the process that computes deltas")
    print_files(predicted, run)
    print_time(predicted, settings.workers or available_cpus(), run)
    if predicted.fit:
        print("             that is the most the fit may take, as timed on a CPU here")
    elif settings.deltas is None:
        takes = "hours for large collections" if settings.method == "tue" else "seconds to minutes"
        print(f"             and what the method itself takes: {takes}")


def _most_fit_seconds(run: Run) -> float:
    """The most that a fit may take; 0 for methods without a network to choose, which are not timed."""
    settings = _settings(run)
    is_fitted = run.output.info(layout.PROTECTION) is not None and not settings.overwrite
    if settings.deltas is not None or is_fitted or not BASELINES[settings.method].trains:
        return 0.0
    method = baseline(settings.method, settings.network)
    how = BaselineSettings(settings.epsilon, effort=settings.effort)
    assert isinstance(method, SurrogateBaseline), f"{settings.method} trains a network"
    with torch_threads(settings.fit_threads):
        return method.most_seconds(_fitted_images(run), _side(run), how)


def _fitted_images(run: Run) -> int:
    """About how many images the deltas are computed on."""
    settings, total = _settings(run), images_of_run(run)
    if settings.per_sample or settings.fit_images is None:
        return total
    return min(total, max(settings.fit_images, LEAST_PER_CLUSTER * _num_labels(run, total)))


def _num_labels(run: Run, images: int) -> int:
    """How many labels there are, as far as that is known before they are read; of numbers in the collection, 0."""
    settings = _settings(run)
    if settings.labels == "cluster":
        return settings.clusters or clusters_for(images, settings.generator)
    if settings.labels == "predicted" and run.surrogate.head is not None:
        return len(run.surrogate.head[1])
    return len(true_classes(run) or ())


def check_baseline_memory(run: Run) -> None:
    """Raise ClusterError, before anything is written, if pictures and deltas do not fit into one process."""
    settings = _settings(run)
    if settings.deltas is None and run.output.info(layout.PROTECTION) is None:
        _check_room(_fitted_images(run), _side(run))


def _check_room(images: int, side: int) -> None:
    what = f"computing deltas of {side} px for {images:,} images (lower --delta-size, or protect a part)"
    with ray_failures():
        check_room(baseline_bytes(images, side), 1, what)


def _side(run: Run) -> int:
    return baseline_side(_settings(run), sides_of(run))


def label(run: Run) -> Clustering:
    """The label of every image, written as its cluster, one file per shard; the clusters that this makes."""
    settings = _settings(run)
    if settings.labels == "cluster":
        return cluster(run)
    have = set(run.output.names(layout.ASSIGNMENTS))
    left = [shard for shard in run.plan.shards if layout.assignment(shard.name) not in have]
    workers = workers_for(settings).on_cpus()
    head = run.surrogate.head if settings.labels == "predicted" else None
    with progress("label", len(left), output=run.output) as bar:
        for done in over_shards(left, Labeller, (context_of(run, workers), true_classes(run), head), workers):
            bar.step(done.name, images=done.images)
    sizes = cluster_counts(run)
    if not sizes:
        raise InputError(f"{settings.input}: none of the images can be protected")
    return label_clustering(max(sizes) + 1)


def fit_baseline(run: Run, clustering: Clustering) -> None:
    """Compute the deltas in a Ray Train worker, or take those that are given, and write the protection."""
    settings = _settings(run)
    if run.output.info(layout.PROTECTION) is not None:
        return
    if settings.deltas is not None:
        take_given(run, clustering)
        return
    side, readers = _side(run), workers_for(settings).on_cpus()
    counts = cluster_counts(run)
    shares = fit_shares(counts, None if settings.per_sample else settings.fit_images)
    _check_room(round(sum(share * counts[label] for label, share in shares.items())), side)
    with ray_failures():
        images = collected(run.plan.shards, FitImageReader, (context_of(run, readers), side, shares, True), readers)
        workers = workers_now(settings, most=1)
        queue = ray.remote(num_cpus=0)(FitQueue).remote([UNIT])
        context = context_of(run, workers)
        task = BaselineTask(context, settings, clustering, run.surrogate.id, images, queue, side, tuple(counts))
        with watched(queue, 1, run.output):
            train_group(baseline_loop, task, workers, run.plan.fingerprint[:16])


def take_given(run: Run, clustering: Clustering) -> None:
    """Write the given deltas of each shard, and the protection. Raises InputError if some are missing."""
    settings, digests = _settings(run), {}
    given = GivenDeltas(str(settings.deltas))
    with progress("fit", len(run.plan.shards), output=run.output) as bar:
        for shard in run.plan.shards:
            assignment = assignment_from_parquet(run.output.read(layout.assignment(shard.name)))
            if assignment.keys:
                digests[shard.name] = write_keyed(run.output, shard.name, given.of(assignment, settings.epsilon))
            bar.step(shard.name, images=len(assignment.keys))
    protection = baseline_protection(
        settings,
        clustering,
        epsilon=settings.epsilon,
        surrogate_id="",
        fingerprint=run.plan.fingerprint,
        digests=digests,
        figures={},
    )
    run.output.create(layout.PROTECTION, protection.to_bytes())
