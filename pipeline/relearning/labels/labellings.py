"""A labelling: the labels that an adversary trains with, made from those of the collection.

original           unchanged
random:N           N random labels by key, balanced within every cluster: only memorisation can fit them
groups:N           classes dealt at random into N equal groups about which the clusters reveal as little as possible
superclasses:FILE  JSON or YAML mapping of class name or index to superclass
concepts:N         k-means on the class names' embeddings (Zhang et al. 2023, section 4.2; Chen et al. 2024)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import InputError, SettingsError, one_line
from pipeline.hashing import derive, numpy_rng
from pipeline.relearning.labels.concepts import group_concepts, grouping_quality
from pipeline.relearning.labels.names import parse_labelling
from pipeline.relearning.labels.overlap import conditional_entropy
from pipeline.settings import near_matches
from pipeline.surrogates.concepts import ConceptBank, imagenet_bank

_DEALS = 200


@dataclass(frozen=True, eq=False)
class Labelling:
    """Labels of n images under one labelling.

    labels   int64 [n], 0 … num_classes - 1
    groups   new label of each original class, int64 [number of classes]; None if labels do not follow classes
    quality  scores by name: sse, silhouette and calinski_harabasz for concepts; mutual_information, in bits, between
             groups and clusters
    """

    name: str
    labels: NDArray[np.int64]
    num_classes: int
    quality: Mapping[str, float] = field(default_factory=dict)
    groups: NDArray[np.int64] | None = None

    def relabel(self, labels: ArrayLike) -> NDArray[np.int64]:
        """Relabel other images, such as test images, from their original labels [m].

        Raises ValueError if labels follow keys rather than classes: make the labelling from those images' keys instead.
        """
        if self.groups is None:
            raise ValueError(f"labelling {self.name} does not follow classes: make one from the other images' keys")
        relabelled: NDArray[np.int64] = self.groups[np.asarray(labels)]
        return relabelled


def make_labelling(
    name: str,
    labels: ArrayLike,
    *,
    seed: int,
    keys: Sequence[str] | None = None,
    clusters: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    bank: ConceptBank | None = None,
    superclasses: Mapping[str, str] | None = None,
) -> Labelling:
    """Apply the labelling `name` to images with original labels [n] >= 0.

    keys         [n], for random:N
    clusters     [n], of the protection; None if unknown
    class_names  of classes 0, 1, …, for concepts:N and for superclasses given by name
    bank         embeddings of the class names; None: ImageNet's classes, see concepts.imagenet_bank
    superclasses what read_superclasses found; None: the file is read here
    Raises SettingsError for an unknown name, a number that does not suit the classes, or a missing argument;
    InputError for a file that cannot be read or lacks a class.
    """
    kind, argument = parse_labelling(name)
    original = np.asarray(labels).astype(np.int64)
    num_classes = int(original.max()) + 1
    if class_names is not None:
        if len(class_names) < num_classes:
            raise SettingsError(f"labelling {name}: {num_classes} classes, but only {len(class_names)} class names")
        if kind in ("superclasses", "concepts"):  # which are made of names, those of classes that do not occur included
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
        found = read_superclasses(Path(argument)) if superclasses is None else superclasses
        groups = _superclasses(argument, found, num_classes, class_names)
    else:
        groups, quality = _concepts(name, class_names, bank, int(argument), seed)
    return Labelling(name, groups[original], int(groups.max()) + 1, quality, groups)


def _random(keys: Sequence[str], clusters: ArrayLike | None, count: int, seed: int) -> NDArray[np.int64]:
    """Within each cluster, deal labels in turn to keys in hash order, starting from a random label."""
    members = np.zeros(len(keys), np.int64) if clusters is None else np.asarray(clusters)
    ranked = sorted(range(len(keys)), key=lambda row: derive(seed, "random labelling", keys[row]))
    turn = {int(cluster): derive(seed, "random labelling start", cluster) % count for cluster in np.unique(members)}
    labels = np.empty(len(keys), np.int64)
    for row in ranked:
        cluster = int(members[row])
        labels[row] = turn[cluster] % count
        turn[cluster] += 1
    return labels


def _dealt(
    name: str, labels: NDArray[np.int64], num_classes: int, clusters: ArrayLike | None, count: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """The random deal that shares least information with the clusters; the first deal if there are no clusters."""
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


def _superclasses(
    path: str, given: Mapping[str, str], num_classes: int, class_names: Sequence[str] | None
) -> NDArray[np.int64]:
    """Superclass of each class, numbered in order of first occurrence."""
    names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
    unknown = [key for key in given if key not in names and not (key.isdecimal() and int(key) < num_classes)]
    if unknown:
        raise InputError(f"{path}: unknown class {unknown[0]!r}{near_matches(unknown[0], names)}")
    values = [given.get(name, given.get(str(index))) for index, name in enumerate(names)]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise InputError(f"{path}: no superclass for {len(missing)} of {num_classes} classes, e.g. {missing[0]!r}")
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    if len(numbers) < 2:
        raise InputError(f"{path}: all classes share one superclass; training needs at least two")
    return np.array([numbers[value] for value in values], np.int64)


def read_superclasses(path: Path) -> dict[str, str]:
    """Class (name or index) -> superclass, from a JSON or YAML file. Raises InputError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as JSON or YAML: {one_line(error, 160)}") from None
    if not isinstance(mapping, dict) or any(isinstance(value, dict | list | None) for value in mapping.values()):
        raise InputError(f"{path} is not a mapping from class (name or index) to superclass")
    return {str(key): str(value) for key, value in mapping.items()}


def _concepts(
    name: str, class_names: Sequence[str] | None, bank: ConceptBank | None, count: int, seed: int
) -> tuple[NDArray[np.int64], dict[str, float]]:
    if class_names is None:
        raise SettingsError(f"labelling {name} needs the class names")
    points = (imagenet_bank() if bank is None else bank).of(class_names)
    try:
        groups = group_concepts(points, count, seed=seed)
    except SettingsError as error:
        raise SettingsError(f"labelling {name}: {error}") from None
    return groups, grouping_quality(points, groups)
