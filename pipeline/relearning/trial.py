"""One trial, from arrays to a row of results: mix clean and protected images, train, test, describe."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError
from pipeline.hashing import numpy_rng
from pipeline.relearning.arms import Arm, Labels
from pipeline.relearning.collection import Collection, holdout_mask
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.evaluation import CLEAN_PART, Trial, needs_deltas
from pipeline.relearning.regimes import Knowledge, find_regime
from pipeline.relearning.regimes.recovery.purify import HERE_DB, OWN_DB
from pipeline.relearning.regimes.staged.projection import project
from pipeline.relearning.shares import protected_mask
from pipeline.relearning.train import TargetScore, train_target
from pipeline.relearning.training import Labelled, ScoredOn, Training, recipe_of

OWN_DELTA, WRONG_DELTA = "accuracy_own_delta", "accuracy_wrong_delta"
SHOWN_IMAGES = 300  # number of images whose activations are plotted
_ROWS_AT_ONCE = 512


def run_trial(
    trial: Trial,
    clean: Collection,
    test: Collection,
    arm: Arm | None,
    labels: Labels,
    *,
    holdout: float,
    everywhere: NDArray[np.bool_] | None = None,
    device: str,
    denoisers: Mapping[str, Denoiser] | None = None,
    resume: dict[str, Any] | None = None,
    on_epoch: Callable[[Training], None] | None = None,
) -> dict[str, Any]:
    """Run a trial; returns a row of results, ready for JSON (see pipeline.relearning.report.results).

    arm         None for the clean controls
    holdout     share of the clean images, chosen by hash, that is held out from training
    everywhere  bool [n], the clean images that all protected copies have: for CLEAN_PART; None: all
    denoisers   regime -> the denoiser trained for it
    resume      what Training.state() returned after an earlier epoch
    on_epoch    called after each epoch
    Raises InputError if nothing is left to train on, SettingsError if the regime lacks what it needs.
    """
    held = holdout_mask(clean.keys, holdout)
    images, train_labels, is_protected, rows = _training_set(trial, clean, arm, labels, held, everywhere)
    known = _knowledge(clean, arm, labels, held, rows, images, trial.regime)

    def after(training: Training) -> None:
        epoch = len(training.history)
        if trial.seed == 0 and epoch in (1, max(1, trial.epochs // 2), trial.epochs):
            training.notes.append(_picture(training, is_protected, epoch))
        if on_epoch is not None:
            on_epoch(training)

    started = time.time()
    recipe = replace(recipe_of(trial.recipe), epochs=trial.epochs)
    score = train_target(
        Labelled(_tensor(images), _tensor(train_labels)),
        ScoredOn(
            Labelled(_tensor(test.images), _tensor(labels.test)),
            Labelled(_tensor(clean.images[held]), _tensor(labels.train[held])) if held.any() else None,
            _delta_tests(arm, labels),
            follow=trial.seed == 0,  # for a curve; the cost is that of two more test sets per epoch
        ),
        regime=find_regime(trial.regime, replace(known, denoisers=denoisers or {}, device=device)),
        seed=trial.seed,
        target=trial.target,
        recipe=recipe,
        device=device,
        resume=resume,
        on_epoch=after,
    )
    return (
        asdict(trial)
        | _row(score, labels, is_protected, device, num_test=len(test), num_holdout=int(held.sum()))
        | {"pictures": list(score.notes), "started": started, "settings": json.dumps(asdict(recipe), sort_keys=True)}
    )


def _training_set(
    trial: Trial,
    clean: Collection,
    arm: Arm | None,
    labels: Labels,
    held: NDArray[np.bool_],
    everywhere: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Images, labels, which of them are protected, and their rows in the clean collection."""
    if arm is None:
        rows = np.flatnonzero(~held)
        if trial.protection == CLEAN_PART:
            rows = rows if everywhere is None else rows[everywhere[rows]]
            keys = [clean.keys[row] for row in rows]
            rows = rows[~protected_mask(trial.share, keys, labels.train[rows], seed=trial.seed)]
        if not len(rows):
            raise InputError(f"{trial.protection}: no images are left to train on")
        return clean.images[rows], labels.train[rows], np.zeros(len(rows), bool), rows
    chosen = np.flatnonzero(~held[arm.rows])
    if not len(chosen):
        raise InputError(f"{trial.protection}: no images are left to train on")
    rows = arm.rows[chosen]
    keys = [clean.keys[row] for row in rows]
    is_protected = protected_mask(trial.share, keys, labels.train[rows], seed=trial.seed)
    images = arm.collection.images[chosen]
    images[~is_protected] = clean.images[rows[~is_protected]]
    return images, labels.train[rows], is_protected, rows


def _knowledge(
    clean: Collection,
    arm: Arm | None,
    labels: Labels,
    held: NDArray[np.bool_],
    rows: NDArray[np.int64],
    images: NDArray[np.uint8],
    regime: str,
) -> Knowledge:
    """What the adversary may use; deltas are those actually present in the files, for regimes that know them."""
    return Knowledge(
        num_groups=None if arm is None else arm.num_groups,
        epsilon=16 / 255 if arm is None else arm.epsilon,
        clean_images=_tensor(clean.images[held]) if held.any() else None,
        clean_labels=_tensor(labels.train[held]) if held.any() else None,
        deltas=_deltas(clean, rows, images) if needs_deltas(regime) else None,
        images=_tensor(images),
        keys=tuple(clean.keys[row] for row in rows),
    )


def _deltas(clean: Collection, rows: NDArray[np.int64], images: NDArray[np.uint8]) -> Tensor:
    """What the training images carry, int16 [n, 3, S, S]; zero for clean ones."""
    deltas = np.empty(images.shape, np.int16)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        np.subtract(images[part], clean.images[rows[part]], out=deltas[part], dtype=np.int16)
    return _tensor(deltas)


def _delta_tests(arm: Arm | None, labels: Labels) -> dict[str, Labelled]:
    """The test images with their own deltas and with wrong ones, where they are known."""
    if arm is None or (tests := arm.delta_tests) is None or not len(tests.rows):
        return {}
    theirs = _tensor(labels.test[tests.rows])
    return {OWN_DELTA: Labelled(_tensor(tests.own), theirs), WRONG_DELTA: Labelled(_tensor(tests.wrong), theirs)}


def _picture(training: Training, is_protected: NDArray[np.bool_], epoch: int) -> dict[str, Any]:
    """Penultimate activations of some training images in two dimensions (Dang et al. 2023, Fig. 5).

    Always the same images, less those that the regime has dropped.
    """
    chosen = numpy_rng(training.seed, "drawn-images").permutation(len(is_protected))[:SHOWN_IMAGES]
    kept = training.rows.numpy()  # in ascending order
    chosen = chosen[np.isin(chosen, kept)]
    rows = np.searchsorted(kept, chosen)
    features = training.features(training.images[torch.from_numpy(rows).to(training.device)]).cpu().numpy()
    return {
        "epoch": epoch,
        "labels": training.labels.cpu().numpy()[rows].tolist(),
        "protected": is_protected[chosen].tolist(),
        **project(features, seed=training.seed),
    }


def _row(
    score: TargetScore,
    labels: Labels,
    is_protected: NDArray[np.bool_],
    device: str,
    *,
    num_test: int,
    num_holdout: int,
) -> dict[str, Any]:
    counts = np.bincount(labels.test, minlength=labels.num_classes)
    figures = score.history[-1].figures
    return {
        "accuracy_last": score.accuracy_last,
        "accuracy_best": score.accuracy_best,
        "accuracy_early_stop": score.accuracy_early_stop,
        "accuracy_holdout": score.accuracy_holdout,
        OWN_DELTA: score.extra_tests.get(OWN_DELTA),
        WRONG_DELTA: score.extra_tests.get(WRONG_DELTA),
        "accuracy_train": score.accuracy_train,
        OWN_DB: figures.get(OWN_DB),
        HERE_DB: figures.get(HERE_DB),
        "diverged": score.diverged,
        "num_train": len(is_protected),
        "num_protected": int(is_protected.sum()),
        "num_test": num_test,
        "num_holdout": num_holdout,
        "num_classes": labels.num_classes,
        "majority": float(counts.max() / counts.sum()),
        "images_per_second": score.images_per_second,
        "seconds": score.seconds,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "history": [asdict(epoch) for epoch in score.history],
    }


def _tensor(array: NDArray[Any]) -> Tensor:
    """As a tensor, without copying; arrays from an object store are read-only, and training only reads them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
