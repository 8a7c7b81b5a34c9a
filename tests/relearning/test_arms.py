"""What an evaluation learns from the records of a run: its clusters, and deltas for test images, or why it has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.deltas.apply import LaidDeltas, protect_sample
from pipeline.deltas.picture_deltas import NearestDeltas
from pipeline.deltas.protection import Protection
from pipeline.deltas.textures import check_key
from pipeline.records import Plan, Sample, Shard
from pipeline.relearning.arms import Arm, Labels, arm_of, protected_tests
from pipeline.relearning.collection import Collection
from pipeline.relearning.trial import run_trial
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.run_record import RunRecord
from pipeline.settings import Settings
from pipeline.storage.store import Store
from pipeline.surrogates.features import Assignment, assignment_to_parquet
from pipeline.surrogates.surrogate import Surrogate
from tests.relearning.test_alignment import loaded, photographs, protection, stored, surrogate
from tests.relearning.test_collection import TRIAL

__all__ = ["protection", "surrogate"]  # fixtures

KEY, SIDE = b"k" * 16, 48
SETTINGS = Settings(surrogate="timm:test_resnet.random-0", surrogate_size=32, encode="lossless")
A = Shard("a.tar", 0, "")
PLAN = Plan((A,), "f")


def named(samples: list[Sample], letter: str) -> list[Sample]:
    return [replace(one, key=one.key.replace("k", letter)) for one in samples]


def run_over(samples: list[Sample], output: Path, source: Protection, surrogate: Surrogate) -> Store:
    """What a run leaves of its protection, and of samples that were clustered one by one."""
    deltas = NearestDeltas(source, surrogate)
    _, clusters = protected_tests(
        samples, [one.key for one in samples], deltas, settings=SETTINGS, side=SIDE, size="native", num_groups=3
    )
    copies = [
        protect_sample(one, LaidDeltas(source), int(cluster), settings=SETTINGS).sample
        for one, cluster in zip(samples, clusters, strict=True)
    ]
    store = stored(output, copies)
    ingredients = ingredients_of(SETTINGS, [A], weights_sha256="w")
    store.put(layout.RUN, RunRecord.of(ingredients, SETTINGS, PLAN).to_bytes())
    store.put(layout.PROTECTION, source.to_bytes())
    keys = tuple(one.key for one in samples)
    found = Assignment("a.tar", keys, clusters.astype(np.int32), np.zeros(len(keys), np.float32))
    store.put(layout.assignment("a.tar"), assignment_to_parquet(found))
    return store


def arm_and_reason(folder: Path, store: Store) -> tuple[Arm, str, Collection, Collection]:
    """The arm of a copy in `store` of the collection in `folder`, which serves as test images under other keys."""
    tests = stored(folder / "test", named(photographs(90, 120), "t"))
    clean, test = loaded(Store(str(folder / "clean")), SIDE), loaded(tests, SIDE)
    arm, why = arm_of("uc", store, loaded(store, SIDE), clean, test, (tests, [A]), "native")
    return arm, why, clean, test


def trained(arm: Arm, clean: Collection, test: Collection) -> dict[str, object]:
    labels = Labels(clean.labels, test.labels, 3)
    trial = replace(TRIAL, epochs=1)
    return run_trial(trial, clean, test, arm, labels, holdout=0.05, device="cpu")


def test_deltas_of_clusters_are_laid_over_test_images_as_the_run_laid_them(
    tmp_path: Path, surrogate: Surrogate, protection: Protection
) -> None:
    samples = photographs(90, 120)
    stored(tmp_path / "clean", samples)
    store = run_over(samples, tmp_path / "safe", protection, surrogate)
    arm, why, clean, test = arm_and_reason(tmp_path, store)
    assert why == ""
    assert arm.delta_tests is not None
    assert np.array_equal(arm.delta_tests.own, arm.collection.images)  # the same pictures, the same clusters
    assert arm.num_groups == 3
    row = trained(arm, clean, test)
    assert isinstance(row["accuracy_own_delta"], float)
    assert isinstance(row["accuracy_wrong_delta"], float)


def test_textures_need_a_key_that_an_evaluation_lacks_so_none_is_laid_and_the_reason_is_given(
    tmp_path: Path, surrogate: Surrogate, protection: Protection
) -> None:
    texture = replace(protection, generator="texture", levels=None, key_sha256=check_key(KEY))
    samples = photographs(90, 120)
    stored(tmp_path / "clean", samples)
    store = run_over(samples, tmp_path / "safe", texture.with_key(KEY), surrogate)
    assert KEY not in store.read(layout.PROTECTION)
    arm, why, clean, test = arm_and_reason(tmp_path, store)
    assert why == "its deltas come from a key, which an evaluation is not given"
    assert arm.delta_tests is None
    assert arm.num_groups is None
    assert arm.clusters is not None
    assert arm.test_clusters is not None
    assert set(arm.test_clusters.tolist()) <= {0, 1, 2}
    row = trained(arm, clean, test)
    assert (row["accuracy_own_delta"], row["accuracy_wrong_delta"]) == (None, None)
    assert 0 <= row["accuracy_last"] <= 1  # type: ignore[operator]


def test_a_copy_without_records_and_a_surrogate_that_is_not_here_are_said_to_be_so(
    tmp_path: Path, surrogate: Surrogate, protection: Protection
) -> None:
    samples = photographs(90, 120)
    bare = stored(tmp_path / "clean", samples)
    assert arm_and_reason(tmp_path, bare)[1] == "no protection lies beside the images"
    other = replace(protection, surrogate_id="another surrogate")
    store = run_over(samples, tmp_path / "safe", protection, surrogate)
    store.put(layout.PROTECTION, other.to_bytes())
    arm, why, *_ = arm_and_reason(tmp_path, store)
    assert why == "its surrogate timm:test_resnet.random-0 is not on this machine, or not the one it was fitted with"
    assert arm.delta_tests is None


def labelled(protection: Protection, labels: str) -> Protection:
    """A published method's protection, with a delta for each label."""
    return replace(protection, method="sp", surrogate_id="", targets=(), figures={"labels": labels})


def run_by_labels(samples: list[Sample], output: Path, source: Protection) -> Store:
    """What a run of a published method leaves that follows true labels."""
    clusters = [int(one.members["cls"]) for one in samples]
    pairs = zip(samples, clusters, strict=True)
    store = stored(output, [protect_sample(one, LaidDeltas(source), at, settings=SETTINGS).sample for one, at in pairs])
    store.put(layout.RUN, RunRecord.of(ingredients_of(SETTINGS, [A], weights_sha256="w"), SETTINGS, PLAN).to_bytes())
    store.put(layout.PROTECTION, source.to_bytes())
    keys = tuple(one.key for one in samples)
    found = Assignment("a.tar", keys, np.array(clusters, np.int32), np.zeros(len(keys), np.float32))
    store.put(layout.assignment("a.tar"), assignment_to_parquet(found))
    return store


def test_a_published_method_with_true_labels_lays_the_delta_of_its_label_over_each_test_image(
    tmp_path: Path, protection: Protection
) -> None:
    samples = photographs(90, 120)
    stored(tmp_path / "clean", samples)
    store = run_by_labels(samples, tmp_path / "safe", labelled(protection, "true"))
    arm, why, clean, test = arm_and_reason(tmp_path, store)
    assert why == ""
    assert arm.delta_tests is not None
    assert np.array_equal(arm.delta_tests.own, arm.collection.images)
    assert (arm.delta_tests.wrong != arm.delta_tests.own).any((1, 2, 3)).all()
    assert arm.test_clusters is not None
    assert np.array_equal(arm.test_clusters, test.labels)
    row = trained(arm, clean, test)
    assert isinstance(row["accuracy_own_delta"], float)
    assert isinstance(row["accuracy_wrong_delta"], float)


def test_a_published_method_says_why_test_images_get_no_delta(tmp_path: Path, protection: Protection) -> None:
    samples = photographs(90, 120)
    stored(tmp_path / "clean", samples)
    store = run_by_labels(samples, tmp_path / "safe", labelled(protection, "true"))
    two = {name: getattr(protection.clustering, name)[:2] for name in ("centroids", "feature_means", "distance_p99")}
    fewer = replace(protection.clustering, **two)
    true = labelled(protection, "true")
    for changed, reason in (
        (labelled(protection, "predicted"), "its deltas follow labels that its run predicted"),
        (replace(true, generator="keyed", levels=None), "its deltas were made for its own images"),
        (replace(true, clustering=fewer, levels=true.levels[:2]), "test images have labels that it has no delta for"),  # type: ignore[index]
    ):
        store.put(layout.PROTECTION, changed.to_bytes())
        arm, why, *_ = arm_and_reason(tmp_path, store)
        assert why.startswith(reason)
        assert arm.delta_tests is None
