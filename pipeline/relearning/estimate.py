"""How long an evaluation will take, from a short training measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline import layout
from pipeline.errors import InputError
from pipeline.measures.cpus import available_cpus
from pipeline.measures.estimate import bytes_per_sample, torch_threads
from pipeline.records import Shard
from pipeline.relearning.collection import MAX_MEMBER_BYTES, Collection, join, load_labelled, smallest_hashes
from pipeline.relearning.denoisers.denoiser import seconds_at_most
from pipeline.relearning.evaluation import (
    CLEAN,
    CLEAN_PART,
    LEAKED_PAIRS,
    EvaluationSettings,
    needs_deltas,
    plain_parts,
)
from pipeline.relearning.labels.given import Classes
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, ScoredOn, recipe_of
from pipeline.storage.store import Store

MEASURED_IMAGES = 256
_COPIES, _DELTAS = 2, 2  # bytes per pixel value of a trial: its images and what a regime makes of them; deltas, int16


@dataclass(frozen=True)
class EvaluationEstimate:
    """What an evaluation takes.

    images            images in each collection
    shared_bytes      memory for the collections and for test images with deltas, once per node
    trial_bytes       additional memory per concurrent trial
    seconds           training time of all trials on one worker
    denoiser_seconds  upper bound for training one denoiser, 0 if none is trained; not part of `seconds`
    num_leaked        trials that train a denoiser of their own
    """

    trials: int
    images: dict[str, int]
    shared_bytes: int
    trial_bytes: int
    seconds: float
    denoiser_seconds: float = 0.0
    num_leaked: int = 0


def estimate_evaluation(
    settings: EvaluationSettings,
    stores: dict[str, tuple[Store, list[Shard]]],
    side: int,
    classes: Classes,
    pairs: Sequence[tuple[Store, list[Shard]]] = (),
) -> EvaluationEstimate:
    """Estimate image counts from the size of the first ones, and time one epoch of the first target under nt.

    stores   clean, test and every arm -> store and shards
    side     at which images are kept, in pixels
    classes  what labels are: see class_numbers
    pairs    store and shards of --pairs: the originals, then their protected copies
    Raises InputError for collections that cannot be read.
    """
    images = {name: _count(store, entries) for name, (store, entries) in stores.items()}
    for name in images.keys() - {"test"}:
        images[name] = min(images[name], settings.images or images[name])
    digests, labels = dict.fromkeys([*stores, CLEAN_PART], ""), dict.fromkeys(settings.labellings, "")
    trials = settings.trials(digests, labels)
    seconds = sum(images.get(trial.arm, images[CLEAN]) * settings.epochs for trial in trials)
    num_leaked = sum(
        LEAKED_PAIRS in plain_parts(trial.regime) and trial.protection not in (CLEAN, CLEAN_PART) for trial in trials
    )
    each = 3 * side * side
    fitted = [name for name in settings.arms if stores[name][0].info(layout.PROTECTION) is not None]
    delta_tests = 2 * images["test"] * len(fitted)  # test images with their own deltas, and with others
    return EvaluationEstimate(
        trials=len(trials),
        images=images,
        shared_bytes=each * (sum(images.values()) + delta_tests + sum(_count(*pair) for pair in pairs)),
        trial_bytes=(_COPIES + _DELTAS * any(map(needs_deltas, settings.regimes))) * each * images[CLEAN],
        seconds=seconds / _images_per_second(settings, *stores[CLEAN], side, classes),
        denoiser_seconds=seconds_at_most(side) if num_leaked or settings.denoisers() else 0.0,
        num_leaked=num_leaked,
    )


def _count(store: Store, entries: list[Shard]) -> int:
    if all(entry.images for entry in entries):
        return sum(len(entry.images) for entry in entries)
    bytes_each = bytes_per_sample(store, entries, max_member_bytes=MAX_MEMBER_BYTES)
    return max(1, round(sum(entry.size for entry in entries) / bytes_each))


def _first_labelled(store: Store, entries: list[Shard], side: int, classes: Classes) -> Collection:
    """Some images of the first shard that has any with a label. Raises InputError if none has."""
    why: InputError | None = None
    for entry in entries:
        limit = max(smallest_hashes(store, [entry], MEASURED_IMAGES), default=None)
        try:
            return join([load_labelled(store, [entry], side=side, limit=limit, classes=classes)], store.url)
        except InputError as error:
            why = why or error
    raise why or InputError(f"{store.url}: no shards")


def _images_per_second(
    settings: EvaluationSettings, store: Store, entries: list[Shard], side: int, classes: Classes
) -> float:
    few = _first_labelled(store, entries, side, classes)
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    cpus = available_cpus()
    with torch_threads(max(1, cpus // (settings.workers or cpus))):  # as a trial has beside others
        return train_target(
            Labelled(images, labels),
            ScoredOn(Labelled(images[:1], labels[:1])),
            regime=find_regime("nt"),
            seed=0,
            target=settings.targets[0],
            recipe=replace(recipe_of(settings.changed_recipe), epochs=1),
        ).images_per_second
