"""Clean and protected images are compared pixel on pixel or not at all; test images carry what a run would add."""

from __future__ import annotations

import copy
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.clusters.clustering import fit_clusters
from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.picture_deltas import NearestDeltas
from pipeline.deltas.protection import Protection
from pipeline.errors import InputError
from pipeline.pictures.members import open_sample
from pipeline.pictures.picture import encode
from pipeline.records import Sample, Shard
from pipeline.relearning import evaluation
from pipeline.relearning.alignment import check_aligned
from pipeline.relearning.arms import Arm, DeltaTests, Labels, protected_tests
from pipeline.relearning.collection import Collection, like_clean, load_labelled
from pipeline.relearning.denoisers.pairs import pair_up
from pipeline.relearning.evaluation import CLEAN, CLEAN_PART, Trial
from pipeline.relearning.report.results import outdated
from pipeline.relearning.trial import run_trial
from pipeline.settings import Settings, Size
from pipeline.shards.photographs import PHOTOGRAPHS, photograph
from pipeline.storage.store import Store
from pipeline.surrogates.surrogate import load_surrogate
from tests.relearning.test_collection import TRIAL
from tests.support.samples import ExtremeDeltas, image_bytes, stripes, tar_bytes

EPSILON = 16 / 255


def without_a_delta(sample: Sample, settings: Settings) -> Sample:
    """As a run would write it but for the delta: what remains is the geometry alone."""
    opened = open_sample(sample, settings=settings)
    image, _ = encode(opened.picture, how=settings.encode, metadata=settings.metadata)
    return Sample(sample.key, dict(sample.members) | {opened.suffix: image})


def photographs(height: int = 120, width: int = 160) -> list[Sample]:
    """Every photograph in colour, as PNG of one size, with a label."""
    found = []
    for number, name in enumerate(PHOTOGRAPHS):
        pixels = np.asarray(Image.fromarray(photograph(name)).convert("RGB").resize((width, height)))
        found.append(Sample(f"k{number:02d}", {"png": image_bytes(pixels), "cls": str(number % 3).encode()}))
    return found


def stored(folder: Path, samples: list[Sample]) -> Store:
    store = Store(str(folder))
    members = [(f"{one.key}.{name}", data) for one in samples for name, data in one.members.items()]
    store.put("a.tar", tar_bytes(members))
    return store


def loaded(store: Store, side: int, size: Size = "native") -> Collection:
    return load_labelled(store, [Shard("a.tar", 0, "")], side=side, size=size)


# --- geometry


@pytest.mark.parametrize("side", [64, 224])
def test_without_a_delta_the_crop_of_a_run_and_the_clean_control_of_it_are_the_same_pixels(tmp_path: Path, side: int):
    settings = Settings(size="224", encode="lossless")
    originals = photographs()
    copies = [without_a_delta(one, settings) for one in originals]
    clean, protected = stored(tmp_path / "clean", originals), loaded(stored(tmp_path / "safe", copies), side)
    control = loaded(clean, side, size="224")
    assert np.array_equal(control.images, protected.images)
    assert like_clean(protected, control, "uc").tolist() == list(range(len(originals)))
    uncropped = loaded(clean, side)
    assert np.abs(uncropped.images.astype(int) - protected.images).max() > 100
    with pytest.raises(InputError, match=r"uc: \d+ of 16 images compared do not lie pixel on pixel") as refused:
        like_clean(protected, uncropped, "uc")
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="--pairs: "):
        pair_up(uncropped, protected)


def test_a_protected_copy_is_aligned_whatever_was_added_within_the_bound(tmp_path: Path):
    settings = Settings(encode="jpeg:75")
    for number, deltas in enumerate((ExtremeDeltas(), ExtremeDeltas(side=2))):
        copies = [protect_sample(one, LaidDeltas(deltas), 1, settings=settings).sample for one in photographs()]
        clean = loaded(stored(tmp_path / "clean", photographs()), 64)
        like_clean(loaded(stored(tmp_path / str(number), copies), 64), clean, "uc")


@pytest.mark.parametrize(
    "moved",
    [
        lambda image: np.roll(image, 1, axis=2),
        lambda image: np.roll(image, 9, axis=1),
        lambda image: image[:, :, ::-1],
        lambda image: image.transpose(0, 2, 1),
        lambda image: np.asarray(
            Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), box=(5, 0, 59, 64))
        ).transpose(2, 0, 1),
    ],
    ids=["shifted by one pixel", "shifted far", "mirrored", "transposed", "squeezed"],
)
def test_whatever_moves_the_picture_is_found(tmp_path: Path, moved):
    clean = loaded(stored(tmp_path / "clean", photographs()), 64)
    images = np.stack([moved(image) for image in clean.images])
    with pytest.raises(InputError, match="pixel on pixel"):
        check_aligned(images, clean.images, np.arange(len(clean)), clean.keys, "uc")


def test_other_pictures_under_the_same_keys_are_found_and_flat_ones_fit_everywhere(tmp_path: Path):
    clean = loaded(stored(tmp_path / "clean", photographs()), 64)
    with pytest.raises(InputError, match="pixel on pixel"):
        check_aligned(np.roll(clean.images, 1, axis=0), clean.images, np.arange(len(clean)), clean.keys, "uc")
    flat = np.full((5, 3, 32, 32), 90, np.uint8)
    check_aligned(flat + np.uint8(8), flat, np.arange(5), list("abcde"), "uc")


# --- test images with deltas


@pytest.fixture(scope="module")
def surrogate():
    return load_surrogate("timm:test_resnet.random-0", weights=None, size=32, device="cpu")


@pytest.fixture(scope="module")
def protection(surrogate) -> Protection:
    features = surrogate.embed_pictures(
        [np.asarray(photograph("coffee"))[:64, at : at + 64] for at in range(0, 240, 40)]
    )
    clustering = fit_clusters([features.astype(np.float16)], "features", None, 3, restarts=2, seed=0).clustering
    levels = np.random.default_rng(1).integers(-16, 17, (3, 3, 16, 16)).astype(np.int8)
    return Protection("uc", "direct", surrogate.id, EPSILON, clustering, (1, 2, 0), levels, "f" * 64)


@pytest.mark.parametrize("size", ["native", "224"])
def test_test_images_carry_what_training_images_of_their_shape_carry(tmp_path: Path, surrogate, protection, size: Size):
    samples = photographs(90, 120)
    settings = Settings(size=size, encode="lossless")
    tests, clusters = protected_tests(
        samples,
        [one.key for one in samples],
        NearestDeltas(protection, surrogate),
        settings=settings,
        side=48,
        size="native",
        num_groups=3,
    )
    copies = [
        protect_sample(one, LaidDeltas(protection), int(cluster), settings=settings).sample
        for one, cluster in zip(samples, clusters, strict=True)
    ]
    assert np.array_equal(tests.own, loaded(stored(tmp_path, copies), 48).images)
    assert tests.rows.tolist() == list(range(len(samples)))
    assert (tests.wrong != tests.own).reshape(len(samples), -1).any(1).all()


def test_a_test_image_that_a_run_would_reject_is_not_tested_with_a_delta(surrogate, protection):
    samples = photographs()[:4]
    samples[1] = Sample("k01", dict(samples[1].members) | {"mask.png": b"an unprotected copy"})
    tests, clusters = protected_tests(
        samples,
        [one.key for one in samples],
        NearestDeltas(protection, surrogate),
        settings=Settings(encode="lossless"),
        side=32,
        size="native",
        num_groups=3,
    )
    assert tests.rows.tolist() == [0, 2, 3]
    assert (clusters >= 0).tolist() == [True, False, True, True]


# --- a trial


def striped(count: int, seed: int) -> Collection:
    images, labels = stripes(count, seed=seed)
    return Collection(images.numpy(), labels.numpy(), tuple(f"s{number}" for number in range(count)))


def row_of(trial: Trial, clean: Collection, arm: Arm | None, **options: object) -> dict[str, object]:
    test = striped(40, seed=9)
    labels = Labels(clean.labels, test.labels, 4)
    return run_trial(trial, clean, test, arm, labels, holdout=0.05, device="cpu", **options)  # type: ignore[arg-type]


def test_accuracy_with_the_own_and_a_wrong_delta_is_known_after_every_epoch_of_the_first_seed():
    clean, test = striped(96, seed=0), striped(40, seed=9)
    black = np.zeros_like(test.images)
    arm = Arm(clean, np.arange(96), delta_tests=DeltaTests(test.images, black, np.arange(40)))
    first = row_of(replace(TRIAL, epochs=2), clean, arm)
    history: Any = first["history"]
    assert [epoch["figures"]["accuracy_own_delta"] for epoch in history] == [e["accuracy_test"] for e in history]
    assert first["accuracy_own_delta"] == first["accuracy_last"]
    shares = np.bincount(test.labels) / 40  # a target gives all black images one class
    assert all(epoch["figures"]["accuracy_wrong_delta"] in shares for epoch in history)
    second = row_of(replace(TRIAL, epochs=1, seed=1), clean, arm)
    assert second["accuracy_own_delta"] is not None
    assert second["history"][0]["figures"] == {}  # type: ignore[index]


def test_activations_are_of_the_same_images_whatever_a_regime_drops_and_outlast_a_restart():
    clean = striped(200, seed=0)
    arm = Arm(clean, np.arange(200))
    trial = replace(TRIAL, regime="epic", share="classes:0.5", epochs=8)
    states: list[dict[str, Any]] = []
    whole = row_of(trial, clean, arm, on_epoch=lambda training: states.append(copy.deepcopy(training.state())))
    pictures: Any = whole["pictures"]
    assert [picture["epoch"] for picture in pictures] == [1, 4, 8]
    counts = [len(picture["labels"]) for picture in pictures]
    assert counts[0] > counts[-1]
    (protected,) = {
        frozenset(label for label, flag in zip(picture["labels"], picture["protected"], strict=True) if flag)
        for picture in pictures
    }
    for picture in pictures:
        assert len(protected) == 2
        assert [label in protected for label in picture["labels"]] == picture["protected"]
    for stopped in (1, 8):
        resumed = row_of(trial, clean, arm, resume=states[stopped - 1])
        assert resumed["pictures"] == pictures


def test_what_is_in_quarantine_elsewhere_is_not_in_the_clean_part():
    clean = striped(120, seed=0)
    kept = np.arange(120) % 3 > 0
    arm = Arm(clean.rows(kept), np.flatnonzero(kept))
    half = replace(TRIAL, share="samples:0.5", epochs=1)
    mixed = row_of(half, clean, arm)
    part = row_of(replace(half, protection=CLEAN_PART), clean, None, everywhere=kept)
    assert mixed["num_train"] - mixed["num_protected"] == part["num_train"]  # type: ignore[operator]


def test_a_trial_that_needs_no_deltas_makes_none():
    clean = striped(600, seed=0)
    arm = Arm(clean, np.arange(600))
    peaks = {}
    for regime in ("nt", "delta-known"):
        tracemalloc.start()
        row_of(replace(TRIAL, regime=regime, epochs=1, seed=1), clean, arm)
        peaks[regime] = tracemalloc.get_traced_memory()[1] / clean.images.nbytes
        tracemalloc.stop()
    assert peaks["nt"] < 1.7  # the training images, and little beside them
    assert 2.5 < peaks["delta-known"] < 4.5


def test_rows_that_an_earlier_version_computed_are_counted_and_not_taken(tmp_path: Path, monkeypatch):
    output = Store(str(tmp_path))
    trials = [TRIAL, replace(TRIAL, seed=1)]
    now = TRIAL.key
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "COMPUTATION", 1)
        assert TRIAL.key != now
        output.put(TRIAL.result, json.dumps(asdict(TRIAL)).encode())
        output.put(replace(TRIAL, epochs=9).result, json.dumps(asdict(replace(TRIAL, epochs=9))).encode())
    assert output.info(TRIAL.result) is None
    assert outdated(trials, output) == 1
    output.put(trials[1].result, json.dumps(asdict(trials[1]) | {"computation": evaluation.COMPUTATION}).encode())
    assert outdated(trials, output) == 1
    assert {CLEAN, CLEAN_PART}.isdisjoint(trial.protection for trial in trials)
