"""What a trial needs besides the clean images: protected arms with their deltas, and labels for both sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.delta import LaidDelta
from pipeline.deltas.load import AnyProtection
from pipeline.deltas.picture_deltas import DeltaRequest, PictureDeltas
from pipeline.errors import ScumbleError
from pipeline.hashing import sha256
from pipeline.pictures.picture import square
from pipeline.relearning.collection import Collection
from pipeline.relearning.labels.labellings import make_labelling
from pipeline.relearning.labels.overlap import overlap
from pipeline.surrogates.concepts import read_bank
from pipeline.surrogates.surrogate import Surrogate, load_surrogate


@dataclass(frozen=True, eq=False)
class Arm:
    """A protected version of the clean collection, and what is known about its deltas.

    rows           int64 [n]: row of the clean collection for each protected image
    clusters       int64 [n]; None if the protection is not available
    test_clusters  int64 [m], the cluster each test image would be given; None if the protection is not available
    levels         int16 [p, 3, S, S], each cluster's delta at this size; None for textures and unknown protections
    own_tests      uint8 [m, 3, S, S], test images with their own deltas where deltas depend on the image, or None
    wrong_tests    uint8 [m, 3, S, S], test images, each with the delta of a different image; None otherwise
    epsilon        bound on |delta|, in [0, 1] pixel units
    """

    collection: Collection
    rows: NDArray[np.int64]
    clusters: NDArray[np.int64] | None = None
    test_clusters: NDArray[np.int64] | None = None
    levels: NDArray[np.int16] | None = None
    own_tests: NDArray[np.uint8] | None = None
    wrong_tests: NDArray[np.uint8] | None = None
    epsilon: float = 16 / 255


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of the clean collection [n] and of the test images [m], int64, under one labelling.

    quality  scores of the grouping, by name, if the labelling groups classes
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    num_classes: int
    quality: Mapping[str, float] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over train and test labels."""
        return sha256(self.train.tobytes() + b"/" + self.test.tobytes())


def carrying(
    images: NDArray[np.uint8], levels: NDArray[np.int16], clusters: NDArray[np.int64], epsilon: float
) -> NDArray[np.uint8]:
    """The images, uint8 [n, 3, S, S], each with its cluster's delta (int16 [p, 3, S, S]) added."""
    deltas = [LaidDelta(delta) for delta in levels.transpose(0, 2, 3, 1)]
    pixels = images.transpose(0, 2, 3, 1)
    changed = [deltas[cluster].added_to(image, epsilon)[0] for image, cluster in zip(pixels, clusters, strict=True)]
    return np.ascontiguousarray(np.stack(changed).transpose(0, 3, 1, 2))


def levels_at(protection: AnyProtection, side: int) -> NDArray[np.int16] | None:
    """Every cluster's delta at the given side, int16 [p, 3, S, S]; None for textures, which have one per image."""
    if protection.per_sample:
        return None
    laid = [protection.delta_for(cluster, "", side, side) for cluster in range(len(protection.targets))]
    return np.ascontiguousarray(np.stack(laid).transpose(0, 3, 1, 2))


def surrogate_of(protection: AnyProtection, settings: Mapping[str, Any]) -> Surrogate | None:
    """The surrogate a protection was fitted with; None if it is not available here.

    settings  of the run that made the protection: surrogate, surrogate_weights, surrogate_size
    """
    weights = settings.get("surrogate_weights")
    try:
        surrogate = load_surrogate(
            settings["surrogate"],
            weights=Path(weights) if weights else None,
            size=settings.get("surrogate_size"),
            device="cpu",
        )
        protection.check_surrogate(surrogate.id)
    except ScumbleError:
        return None
    return surrogate


def delta_tests(test: Collection, deltas: PictureDeltas) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The test images with the delta each would get, and with the delta of the preceding image."""
    side = test.images.shape[-1]
    levels: list[NDArray[np.int16]] = []
    for start in range(0, len(test), 64):
        pictures = test.images[start : start + 64].transpose(0, 2, 3, 1)
        keys = test.keys[start : start + 64]
        requests = [
            DeltaRequest(key, picture, side, side, square=None if deltas.side is None else square(picture, deltas.side))
            for key, picture in zip(keys, pictures, strict=True)
        ]
        levels += [answer.delta.levels for answer in deltas.for_pictures(requests)]
    laid = np.stack(levels).transpose(0, 3, 1, 2)
    rows, epsilon = np.arange(len(test)), deltas.epsilon
    return carrying(test.images, laid, rows, epsilon), carrying(test.images, laid, np.roll(rows, 1), epsilon)


def test_clusters(test: Collection, protection: AnyProtection, surrogate: Surrogate) -> NDArray[np.int64]:
    """The cluster that each test image would be given, int64 [m]."""
    pictures = list(test.images.transpose(0, 2, 3, 1))
    features = [surrogate.embed_pictures(pictures[at : at + 64]) for at in range(0, len(pictures), 64)]
    return protection.clustering.assign(np.concatenate(features))[0].astype(np.int64)


def label_both(
    name: str, clean: Collection, test: Collection, arms: list[Arm], *, classes: str | None, concepts: str | None
) -> Labels:
    """Label the clean and the test images.

    name      the labelling, e.g. 'groups:5'
    arms      protected arms; a labelling that depends on clusters uses those of the first arm that has any
    classes   path of a file with one class name per line
    concepts  path of a concept bank
    Raises SettingsError if something the labelling needs is missing, InputError for files that do not match.
    """
    class_names = Path(classes).read_text(encoding="utf-8").split("\n") if classes else None
    if class_names is not None:
        class_names = [line.strip() for line in class_names if line.strip()]
    given = next((arm for arm in arms if arm.clusters is not None), None)
    train_clusters = None
    if given is not None and given.clusters is not None:
        train_clusters = np.full(len(clean), -1, np.int64)
        train_clusters[given.rows] = given.clusters
    bank = read_bank(Path(concepts)) if concepts else None
    make = partial(make_labelling, name, seed=0, class_names=class_names, bank=bank)
    train = make(clean.labels, keys=clean.keys, clusters=train_clusters)
    if train.groups is not None:
        return Labels(train.labels, train.relabel(test.labels), train.num_classes, train.quality)
    clusters = None if given is None else given.test_clusters
    tested = make(test.labels, keys=test.keys, clusters=clusters)
    return Labels(train.labels, tested.labels, train.num_classes)


def overlap_columns(arm: Arm, labels: Labels) -> dict[str, float]:
    """How much a protection's clusters reveal about the labels, as columns for its rows."""
    assert arm.clusters is not None, "only where the clusters are known"
    scores = overlap(arm.clusters, labels.train[arm.rows])
    return {
        "purity": scores.purity,
        "adjusted_mutual_information": scores.ami,
        "shortcut_accuracy": scores.shortcut_accuracy,
    }
