"""A labelling: the labels that an adversary trains with, made from those of the collection.

original           as they are
random:N           N random labels, by key, alike in every cluster: nothing but memory can learn them
groups:N           classes dealt into N equal groups at random, with the least that clusters tell about them
superclasses:FILE  JSON or YAML: name or index of a class -> its superclass
concepts:N         k-means of the class names' embeddings (Zhang et al. 2023, section 4.2; Chen et al. 2024)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import InputError, SettingsError, one_line
from pipeline.fingerprint import derive, numpy_rng
from pipeline.relearning.labels.concepts import group_concepts, grouping_quality
from pipeline.relearning.labels.names import parse_labelling
from pipeline.relearning.labels.overlap import conditional_entropy
from pipeline.settings import near_matches
from pipeline.surrogates.concepts import ConceptBank, imagenet_bank

_DEALS = 200


@dataclass(frozen=True, eq=False)
class Labelling:
    """labels int64 [n], 0 … num_classes - 1.

    groups   new label of every original class, int64 [number of classes]; None where labels do not follow classes
    quality  figures of the choice, by name: sse, silhouette, calinski_harabasz of concepts; mutual_information in bits
             between groups and clusters
    """

    name: str
    labels: NDArray[np.int64]
    num_classes: int
    quality: Mapping[str, float] = field(default_factory=dict)
    groups: NDArray[np.int64] | None = None

    def relabel(self, labels: ArrayLike) -> NDArray[np.int64]:
        """The same for other images (test images) with original labels [m].

        Raises ValueError where labels follow keys, not classes: make the labelling of those images' keys instead.
        """
        if self.groups is None:
            raise ValueError(
                f"labelling {self.name} does not follow classes: make it again from the other images' keys"
            )
        found: NDArray[np.int64] = self.groups[np.asarray(labels)]
        return found


def make_labelling(
    name: str,
    labels: ArrayLike,
    *,
    seed: int,
    keys: Sequence[str] | None = None,
    clusters: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    bank: ConceptBank | None = None,
) -> Labelling:
    """The labelling `name` of images with original labels [n] >= 0.

    keys         [n], for random:N
    clusters     [n], of the protection; None where they are not known
    class_names  of the classes 0, 1, …, for concepts:N and for superclasses by name
    bank         the class names' embeddings; None: ImageNet's classes, see concepts.imagenet_bank
    Raises SettingsError for an unknown name or a number that the classes do not allow, or if what the labelling needs
    is not given; InputError for a file that cannot be read or lacks a class.
    """
    kind, argument = parse_labelling(name)
    original = np.asarray(labels).astype(np.int64)
    num_classes = int(original.max()) + 1
    if class_names is not None:
        if len(class_names) < num_classes:
            raise SettingsError(f"labelling {name}: {len(class_names)} class names for labels up to {num_classes - 1}")
        num_classes = len(class_names)
    if kind == "random":
        if keys is None:
            raise SettingsError(f"labelling {name} needs the keys of the samples")
        return Labelling(name, _random(keys, clusters, int(argument), seed), int(argument))
    quality: dict[str, float] = {}
    if kind == "original":
        groups = np.arange(num_classes)
    elif kind == "groups":
        groups, quality = _dealt(name, original, num_classes, clusters, int(argument), seed)
    elif kind == "superclasses":
        groups = _superclasses(Path(argument), num_classes, class_names)
    else:
        groups, quality = _concepts(name, class_names, bank, int(argument), seed)
    return Labelling(name, groups[original], int(groups.max()) + 1, quality, groups)


def _random(keys: Sequence[str], clusters: ArrayLike | None, count: int, seed: int) -> NDArray[np.int64]:
    """Within each cluster keys take turns in the order of their hashes, from a random label on."""
    members = np.zeros(len(keys), np.int64) if clusters is None else np.asarray(clusters)
    ranked = sorted(range(len(keys)), key=lambda row: derive(seed, "random labelling", keys[row]))
    turn = {int(one): derive(seed, "random labelling start", one) % count for one in np.unique(members)}
    labels = np.empty(len(keys), np.int64)
    for row in ranked:
        cluster = int(members[row])
        labels[row] = turn[cluster] % count
        turn[cluster] += 1
    return labels


def _dealt(
    name: str, labels: NDArray[np.int64], num_classes: int, clusters: ArrayLike | None, count: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """Of many random deals the one that shares least information with the clusters; the first if there are none."""
    if count > num_classes:
        raise SettingsError(f"labelling {name}: there are only {num_classes} classes")
    rng = numpy_rng(seed, "class groups", count)
    deals = [rng.permutation(np.arange(num_classes) % count) for _ in range(_DEALS)]
    if clusters is None:
        return deals[0], {}
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    joint = np.zeros((members.max() + 1, num_classes), np.int64)
    np.add.at(joint, (members, labels), 1)
    shared = [_mutual_information(joint @ np.eye(count, dtype=np.int64)[deal]) for deal in deals]
    best = int(np.argmin(shared))
    return deals[best], {"mutual_information": shared[best]}


def _mutual_information(joint: NDArray[np.int64]) -> float:
    return conditional_entropy(joint.sum(axis=0, keepdims=True)) - conditional_entropy(joint)


def _superclasses(path: Path, num_classes: int, class_names: Sequence[str] | None) -> NDArray[np.int64]:
    """Superclass of every class, numbered as they first occur by class."""
    given = {str(key): str(value) for key, value in _mapping(path).items()}
    names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
    unknown = [key for key in given if key not in names and not (key.isdecimal() and int(key) < num_classes)]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is no class{near_matches(unknown[0], names)}")
    values = [given.get(name, given.get(str(index))) for index, name in enumerate(names)]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise InputError(f"{path}: no superclass for {len(missing)} of {num_classes} classes, first {missing[0]!r}")
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    if len(numbers) < 2:
        raise InputError(f"{path}: all classes have one superclass; two are needed to learn anything")
    return np.array([numbers[value] for value in values], np.int64)


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as JSON or YAML: {one_line(error, 160)}") from None
    if not isinstance(found, dict) or any(isinstance(value, dict | list | None) for value in found.values()):
        raise InputError(f"{path} is not a mapping of class (name or index) to superclass")
    return found


def _concepts(
    name: str, class_names: Sequence[str] | None, bank: ConceptBank | None, count: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, float]]:
    if class_names is None:
        raise SettingsError(f"labelling {name} needs the names of the classes")
    points = (imagenet_bank() if bank is None else bank).of(class_names)
    try:
        groups = group_concepts(points, count, seed=seed)
    except SettingsError as error:
        raise SettingsError(f"labelling {name}: {error}") from None
    return groups, grouping_quality(points, groups)
