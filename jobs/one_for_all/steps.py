"""The steps of training a universal generator: check, read the pictures, train, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.cluster.connect import Workers, check_room, workers_now
from actors.cluster.failures import ray_failures
from actors.cluster.train_group import train_group
from actors.fit_queue import FitQueue
from actors.universal_trainer import UNIT, UniversalTask, universal_loop, unpacked_squares
from jobs.protection.stages import watched
from jobs.shared import cli
from jobs.shared.inputs import list_input
from pipeline import layout
from pipeline.deltas.load import load_protection, load_universal_protection
from pipeline.errors import ConflictError, SettingsError
from pipeline.fitting.fit_images import fit_bytes
from pipeline.hashing import canonical, library_versions, sha256
from pipeline.measures.estimate import count_samples, first_usable
from pipeline.one_for_all.estimate import estimate_training
from pipeline.one_for_all.finish import bank_tensor
from pipeline.one_for_all.pictures import read_squares, square_side
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.one_for_all.training import check_bank, check_batch
from pipeline.pictures.members import picture_of
from pipeline.records import Shard
from pipeline.report.page import duration, size
from pipeline.shards.samples import samples_of
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store, file_at
from pipeline.surrogates.concepts import ConceptBank, bank_bytes, bank_for
from pipeline.surrogates.surrogate import Surrogate, check_surrogate, known_surrogate


@dataclass(frozen=True)
class UniversalTraining:
    """A training that was checked and may start."""

    settings: OneForAllSettings
    sources: tuple[tuple[Store, list[Shard]], ...]
    output: Store
    name: str
    surrogate: Surrogate
    bank: ConceptBank
    fingerprint: str
    is_done: bool

    @property
    def summary(self) -> str:
        settings, count = self.settings, sum(len(entries) for _, entries in self.sources)
        total = sum(entry.size for _, entries in self.sources for entry in entries) / 1e6
        side = settings.side_for(self.surrogate.input_size)
        lines = [
            f"input        {' '.join(settings.input)}: {count} shards, {total:,.1f} MB",
            f"output       {settings.output}",
            f"concepts     {len(self.bank.names):,}, surrogate {settings.surrogate} at {self.surrogate.input_size} px",
            f"generator    width {settings.width}, {settings.blocks} blocks, {side} px, "
            f"epsilon {settings.epsilon * 255:g}/255, {settings.loss}",
        ]
        return "\n".join(lines + (["trained      already; nothing to do"] if self.is_done else []))


def prepare_training(settings: OneForAllSettings) -> UniversalTraining:
    """List the input, load surrogate and concepts, look whether the output is finished. Raises a ScumbleError."""
    check_surrogate(settings.surrogate)
    sources = tuple(list_input(url) for url in settings.input)
    surrogate = known_surrogate(settings)
    weights = Path(settings.surrogate_weights) if settings.surrogate_weights else None
    bank = bank_for(settings.concepts, surrogate, weights=weights)
    check_bank(bank_tensor(bank), surrogate.dimension, settings)
    output, name = file_at(settings.output)
    if not name.endswith(".safetensors"):
        raise SettingsError(f"--output {settings.output} must be a file that ends in .safetensors")
    for source, _ in sources:
        check_apart(source, output, may_hold=True)
    listing = [[store.url, entry.name, entry.size, entry.etag] for store, entries in sources for entry in entries]
    deciding = {
        "settings": settings.deciding,
        "listing": listing,
        "weights": surrogate.weights_sha256,
        "bank": sha256(bank_bytes(bank)),
        "versions": library_versions(),
    }
    fingerprint = sha256(canonical(deciding))
    return UniversalTraining(
        settings, sources, output, name, surrogate, bank, fingerprint, _is_done(settings, output, name, fingerprint)
    )


def _is_done(settings: OneForAllSettings, output: Store, name: str, fingerprint: str) -> bool:
    data = None if settings.overwrite else output.read_if_there(name)
    if data is None:
        return False
    there = load_protection(data)
    if there.fingerprint != fingerprint:
        raise ConflictError(f"{settings.output} holds another protection: choose another --output, or add --overwrite")
    return True


def count_images(run: UniversalTraining) -> int:
    """About how many images the inputs have."""
    limit = run.settings.max_member_bytes
    return max(1, sum(count_samples(store, shards, max_member_bytes=limit) for store, shards in run.sources))


def print_training(run: UniversalTraining) -> int:
    """Print what the training would take, estimated from a step on a few images; uses no Ray and writes nothing."""
    settings = run.settings
    if run.is_done:
        return cli.DONE
    check_batch(settings, settings.workers or 1)
    total = count_images(run)
    images = min(settings.images or total, total)
    store, entries = run.sources[0]
    squares = read_squares(
        first_usable(
            store,
            entries,
            max_member_bytes=settings.max_member_bytes,
            use=lambda sample: picture_of(sample, max_pixels=settings.max_pixels),
        ),
        entries[0].name,
        f"{store.url}/{entries[0].name}",
        side=square_side(settings.side_for(run.surrogate.input_size)),
        share=1.0,
        seed=settings.seed,
        max_pixels=settings.max_pixels,
        with_labels=settings.select_by == "label",
    )
    estimate = estimate_training(squares, run.surrogate, bank_tensor(run.bank), settings, images)
    workers = settings.workers or 1
    print(f"images       about {images:,} of {total:,}, at {squares.pixels.shape[-1]} px")
    print(f"steps        {estimate.steps:,} of {settings.batch_size} images, with checkpoints to resume from")
    model = f"{size(estimate.model_bytes)} for generator and optimiser, without activations"
    print(f"memory       {size(estimate.image_bytes)} of images in each worker, and once for all; {model}")
    spent = duration(estimate.seconds / workers)
    print(f"time         about {spent} with {workers} workers, as measured on a CPU here; a GPU takes far less")
    return cli.DONE


def load_squares(run: UniversalTraining) -> list[Any]:
    """References to the training pictures in the object store; warns about what is left out."""
    settings = run.settings
    with ray_failures():
        check_batch(settings, _workers(settings).count)
    side = square_side(settings.side_for(run.surrogate.input_size))
    total = count_images(run)
    images = min(settings.images or total, total)
    share = images / total
    references = []
    with ray_failures():
        what = f"training on {images:,} images at {side} px (lower --images or --workers)"
        check_room(fit_bytes(images, side), _workers(settings).count, what)
        for store, entries in run.sources:
            found, left = unpacked_squares(store, entries, settings, side=side, share=share)
            cli.print_left_out(left)
            references += found
    return references


def train_generator(run: UniversalTraining, squares: list[Any]) -> None:
    """Train in a group of Ray Train workers; whatever is killed, training resumes from the last checkpoint."""
    with ray_failures():
        workers = _workers(run.settings)
        queue = ray.remote(num_cpus=0)(FitQueue).remote([UNIT])
        task = UniversalTask(
            run.settings, run.bank, run.fingerprint, run.output, run.name, squares, queue, workers.threads
        )
        shown = layout.training_progress(run.name)
        with watched(queue, 1, run.output, shown):
            train_group(universal_loop, task, workers, run.fingerprint[:16], connected=True)
        run.output.delete([shown])


def _workers(settings: OneForAllSettings) -> Workers:
    """One process per GPU; on CPUs one with all threads of a node, unless --workers asks for more."""
    return workers_now(settings, most=None if settings.gpus_per_worker or settings.workers else 1)


def report(run: UniversalTraining) -> int:
    """Write the report beside the protection, and print how far embeddings were moved."""
    from pipeline.one_for_all.page import write_training_report  # matplotlib: half a second, at the end only

    protection = load_universal_protection(run.output.read(run.name))
    store, entries = run.sources[0]
    page = f"{run.name.removesuffix('.safetensors')}.html"
    samples = samples_of(store, entries[0], max_member_bytes=run.settings.max_member_bytes, any_version=True)
    html = write_training_report(protection, run.surrogate, samples, run.settings)
    run.output.put(page, html.encode())
    curves = protection.figures["curves"]
    print(f"steps        {protection.figures['steps']:,} on {protection.figures['images']:,} images")
    for name, words in (("near", "similar concepts"), ("opposite", "the opposite concept")):
        print(f"cosine       to {words}: {curves[name + '_clean'][-1]:.3f} clean, {curves[name][-1]:.3f} protected")
    print(f"protection   {run.settings.output}")
    print(f"report       {run.output.url}/{page}")
    return cli.DONE
