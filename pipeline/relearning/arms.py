"""What a trial needs besides the clean images: protected arms with their deltas, and labels for both sets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.deltas.apply import close_sample
from pipeline.deltas.delta import LaidDelta, lay
from pipeline.deltas.load import AnyProtection, deltas_of, load_protection
from pipeline.deltas.picture_deltas import DeltaAnswer, DeltaRequest, PictureDeltas, PictureOpener, picture_batches
from pipeline.errors import InputError, SampleError, ScumbleError
from pipeline.hashing import derive, sha256
from pipeline.records import Rejection, Sample, Shard
from pipeline.relearning.collection import Collection, like_clean
from pipeline.relearning.labels.files import LabelFiles
from pipeline.relearning.labels.labellings import make_labelling
from pipeline.relearning.labels.overlap import overlap
from pipeline.runs.run_record import read_run
from pipeline.settings import ApplySettings, Size, apply_settings
from pipeline.shards.samples import samples_of
from pipeline.shards.squares import square_of, stacked
from pipeline.storage.store import Store
from pipeline.surrogates.features import assignment_from_parquet
from pipeline.surrogates.surrogate import Surrogate, load_surrogate

_AT_ONCE = 64  # test images that get their deltas together


@dataclass(frozen=True, eq=False)
class DeltaTests:
    """Test images as a run would have published them.

    own    uint8 [k, 3, S, S], with the deltas that they would get
    wrong  uint8 [k, 3, S, S], each with the delta of another cluster, or of the image before it where images have
           deltas of their own
    rows   int64 [k], their rows among the test images; a run would have put the others into quarantine
    """

    own: NDArray[np.uint8]
    wrong: NDArray[np.uint8]
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arm:
    """A protected version of the clean collection, and what is known about its deltas.

    rows           int64 [n]: row of the clean collection for each protected image
    clusters       int64 [n]; None if the protection is not available
    test_clusters  int64 [m], the cluster each test image would be given; None if the protection is not available
    num_groups     number of deltas if each is shared by a cluster; None for others and for unknown protections
    delta_tests    test images with deltas; None if the protection cannot make any here
    epsilon        bound on |delta|, in [0, 1] pixel units
    """

    collection: Collection
    rows: NDArray[np.int64]
    clusters: NDArray[np.int64] | None = None
    test_clusters: NDArray[np.int64] | None = None
    num_groups: int | None = None
    delta_tests: DeltaTests | None = None
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


def arm_of(
    name: str,
    store: Store,
    protected: Collection,
    clean: Collection,
    test: Collection,
    test_shards: tuple[Store, Sequence[Shard]],
    size: Size,
) -> tuple[Arm, str]:
    """A protected collection with what its run tells of its deltas, and why no test image can get one; "" if they can.

    name         of the collection, for messages
    store        where it lies, with its protection beside it if a run wrote it
    test_shards  store and shards of the test collection
    size         how the protected images were loaded
    Raises InputError if the collection does not match the clean one, or if its records do not match it.
    """
    arm = Arm(protected, like_clean(protected, clean, name))
    data = store.read_if_there(layout.PROTECTION)
    if data is None:
        return arm, "no protection lies beside the images"
    protection = load_protection(data)
    arm = replace(arm, clusters=_clusters(store, protected), epsilon=protection.epsilon)
    if not protection.per_sample:
        arm = replace(arm, num_groups=len(protection.clustering.centroids))
    settings = read_run(store).ingredients.settings
    writing = apply_settings(settings)
    given, why = _given_clusters(protection, test)
    if why:
        return arm, why
    surrogate = surrogate_of(protection, settings) if given is None else None
    if given is None and surrogate is None:
        why = f"its surrogate {settings['surrogate']} is not on this machine, or not the one it was fitted with"
        return arm, why
    if protection.needs_key and surrogate is not None:
        clusters = clusters_of(test, protection, surrogate)
        return replace(arm, test_clusters=clusters), "its deltas come from a key, which an evaluation is not given"
    tests, clusters = protected_tests(
        _samples(*test_shards, writing.max_member_bytes),
        test.keys,
        deltas_of(data, surrogate, small_images=writing.small_images),
        settings=writing,
        side=test.images.shape[-1],
        size=size,
        num_groups=arm.num_groups,
        given=given,
    )
    if (clusters < 0).any():  # a run would reject the image, but a labelling by clusters needs one for it
        others = clusters_of(test, protection, surrogate) if surrogate is not None else test.labels
        clusters = np.where(clusters < 0, others, clusters)
    return replace(arm, test_clusters=clusters, delta_tests=tests), ""


def _given_clusters(protection: AnyProtection, test: Collection) -> tuple[dict[str, int] | None, str]:
    """The cluster of each test image, by key, if its label says it, else None; and why none can be had, or ""."""
    if protection.generator == "keyed":
        return None, "its deltas were made for its own images, and test images have none"
    labels = protection.figures.get("labels", "cluster")  # those that a published method followed
    if labels == "cluster":
        return None, ""
    if labels != "true":
        return None, "its deltas follow labels that its run predicted, and test images have none of those"
    if test.num_classes > len(protection.clustering.centroids):
        return None, "test images have labels that it has no delta for"
    return dict(zip(test.keys, test.labels.tolist(), strict=True)), ""


def _samples(store: Store, shards: Sequence[Shard], max_member_bytes: int) -> Iterator[Sample | Rejection]:
    for shard in shards:
        yield from samples_of(store, shard, max_member_bytes=max_member_bytes, any_version=True)


def _clusters(store: Store, protected: Collection) -> NDArray[np.int64]:
    """The cluster of every protected image, by key."""
    found: dict[str, int] = {}
    for name in store.names(layout.ASSIGNMENTS):
        assignment = assignment_from_parquet(store.read(name))
        found |= dict(zip(assignment.keys, assignment.clusters.tolist(), strict=True))
    missing = [key for key in protected.keys if key not in found]
    if missing:
        raise InputError(f"{store.url}: no cluster is recorded for {len(missing):,} keys, first {missing[0]}")
    return np.array([found[key] for key in protected.keys], np.int64)


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


def protected_tests(
    samples: Iterable[Sample | Rejection],
    keys: Sequence[str],
    deltas: PictureDeltas,
    *,
    settings: ApplySettings,
    side: int,
    size: Size,
    num_groups: int | None,
    given: Mapping[str, int] | None = None,
) -> tuple[DeltaTests, NDArray[np.int64]]:
    """The test images protected as a run would, at their full size, before they are cut to squares like all others.

    samples     of the test collection
    keys        of its images that are tested, [m]
    settings    how the run writes pictures
    side        S of the results
    size        see squares.square_of
    num_groups  see Arm
    given       the cluster of each image, by key; None: `deltas` finds it
    Returns the cluster of every image as well, int64 [m]; -1 where a run would reject the image.
    """
    rows = {key: row for row, key in enumerate(keys)}
    wanted = (item for item in samples if isinstance(item, Sample) and item.key in rows)
    opener, wrong_of = PictureOpener(settings, deltas, given), _WrongDeltas(deltas, num_groups)
    squares: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    tested: list[int] = []
    clusters = np.full(len(keys), -1, np.int64)
    for batch in picture_batches(wanted, _AT_ONCE):
        opened = [result for result in map(opener.open, batch) if not isinstance(result, Rejection)]
        requests = [request for _, request in opened]
        answers = deltas.for_pictures(requests) if requests else []
        for (picture, request), own, wrong in zip(opened, answers, wrong_of(requests, answers), strict=True):
            clusters[rows[request.key]] = own.cluster
            with contextlib.suppress(SampleError):  # it cannot be written: a run would reject it
                pair = [
                    square_of(
                        close_sample(picture, laid, deltas.epsilon, settings=settings).sample,
                        side,
                        max_pixels=settings.max_pixels,
                        keep_sidecar=settings.keep_sidecar,
                        size=size,
                    )
                    for laid in (own.delta, wrong)
                ]
                squares.append((pair[0], pair[1]))
                tested.append(rows[request.key])
    own_squares, wrong_squares = ([pair[which] for pair in squares] for which in (0, 1))
    return DeltaTests(stacked(own_squares, side), stacked(wrong_squares, side), np.array(tested, np.int64)), clusters


class _WrongDeltas:
    """For each picture the delta of another cluster, or that of the picture before it."""

    def __init__(self, deltas: PictureDeltas, num_groups: int | None) -> None:
        self._deltas, self._num_groups = deltas, num_groups
        self._last: LaidDelta | None = None

    def __call__(self, requests: Sequence[DeltaRequest], answers: Sequence[DeltaAnswer]) -> list[LaidDelta]:
        if self._num_groups is None:
            self._last = self._last or (answers[-1].delta if answers else None)
            return [self._before(answer.delta) for answer in answers]
        others = [
            (answer.cluster + 1 + derive(0, "wrong-delta", request.key) % max(1, self._num_groups - 1))
            % self._num_groups
            for request, answer in zip(requests, answers, strict=True)
        ]
        asked = [replace(request, cluster=other) for request, other in zip(requests, others, strict=True)]
        return [answer.delta for answer in self._deltas.for_pictures(asked)] if asked else []

    def _before(self, delta: LaidDelta) -> LaidDelta:
        """The delta before this one, at this one's size; before the first comes the last of its batch."""
        height, width, _ = delta.levels.shape
        before, self._last = self._last or delta, delta
        small = np.ascontiguousarray(before.levels.transpose(2, 0, 1), np.int8)
        return LaidDelta(lay(small, height, width, self._deltas.epsilon))


def clusters_of(test: Collection, protection: AnyProtection, surrogate: Surrogate) -> NDArray[np.int64]:
    """The cluster that each test image would be given, as far as its square tells, int64 [m]."""
    pictures = list(test.images.transpose(0, 2, 3, 1))
    features = [surrogate.embed_pictures(pictures[at : at + _AT_ONCE]) for at in range(0, len(pictures), _AT_ONCE)]
    return protection.clustering.assign(np.concatenate(features))[0].astype(np.int64)


def label_both(name: str, clean: Collection, test: Collection, arms: list[Arm], files: LabelFiles) -> Labels:
    """Label the clean and the test images.

    name  the labelling, e.g. 'groups:5'
    arms  protected arms; a labelling that depends on clusters uses those of the first arm that has any
    Raises SettingsError if something the labelling needs is missing, InputError for files that do not match.
    """
    given = next((arm for arm in arms if arm.clusters is not None), None)
    train_clusters = None
    if given is not None and given.clusters is not None:
        train_clusters = np.full(len(clean), -1, np.int64)
        train_clusters[given.rows] = given.clusters
    make = partial(
        make_labelling,
        name,
        seed=0,
        class_names=files.class_names,
        bank=files.bank,
        superclasses=files.superclasses.get(name),
    )
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
