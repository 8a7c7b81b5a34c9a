"""Activation cluster measure (ACM): how tightly penultimate features cluster by label.

It is low in the first epochs and high once a network is caught in what the deltas teach (Dang et al., section III-B,
"ACM Indicator"). The text available to us gives its ingredients (class centre, intra-class distance, radius,
inter-class distance) but not the equation. Every variant here uses those, grows as classes tighten or move apart, and
is invariant to the scale of the features, because the scale of a t-SNE map is meaningless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from pipeline.errors import InputError
from pipeline.hashing import derive, numpy_rng

PERPLEXITY = 30.0
ITERATIONS = 1_000
FIRST_CLASSES = 10  # the paper uses the first ten classes of data sets that have more

Points = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class _Classes:
    """Points by class: centres [C, 2], mean distance to the centre [C], radius [C], members of each class."""

    centres: Points
    spread: Points
    radius: Points
    members: tuple[Points, ...]


def _db_inverse(classes: _Classes) -> float:
    """Mean over pairs of d_ij / (sigma_i + sigma_j): the inverse of a Davies-Bouldin term."""
    return _mean_ratio(_between(classes), classes.spread)


def _radius_ratio(classes: _Classes) -> float:
    """Mean over pairs of d_ij / (r_i + r_j)."""
    return _mean_ratio(_between(classes), classes.radius)


def _gap(classes: _Classes) -> float:
    """Mean over pairs of (d_ij - r_i - r_j) / (sigma_i + sigma_j): the gap between discs; may be negative."""
    return _mean_ratio(_between(classes) - _pair_sums(classes.radius), classes.spread)


def _ratio_of_means(classes: _Classes) -> float:
    """Mean of d_ij over mean of sigma_i."""
    return float(_ratio(_between(classes).mean(), classes.spread.mean()))


def _mean_of_pairs(classes: _Classes) -> float:
    """Mean over pairs of (mean distance from points of i to points of j) / (s_i + s_j), s the mean distance within."""
    rows, columns = np.triu_indices(len(classes.members), 1)
    between = np.array(
        [cdist(classes.members[i], classes.members[j]).mean() for i, j in zip(rows, columns, strict=True)]
    )
    inside = np.array([cdist(own, own).sum() / (len(own) * (len(own) - 1)) for own in classes.members])
    return _mean_ratio(between, inside)


VARIANTS: dict[str, Callable[[_Classes], float]] = {
    "db_inverse": _db_inverse,
    "radius_ratio": _radius_ratio,
    "gap": _gap,
    "ratio_of_means": _ratio_of_means,
    "mean_of_pairs": _mean_of_pairs,
}
REDUCTIONS = ("tsne", "pca2", "none")


def activation_cluster_measure(
    features: NDArray[np.float32] | Points,
    labels: Labels,
    *,
    variant: str = "db_inverse",
    reduce: str = "tsne",
    seed: int = 0,
) -> float:
    """How tight and how far apart the classes of `features` are; larger is tighter.

    features  float [n, d], finite
    labels    int [n]; classes with fewer than two samples are ignored
    variant   reading of the definition, a name in VARIANTS
    reduce    reduction to two dimensions beforehand: tsne (the paper), pca2, or none
    seed      of t-SNE and PCA; the same features and seed give the same value
    Returns 0 if all features are equal, infinity if every class is a single point. Raises InputError unless two classes
    have two samples each. Source: Dang et al., Eqs. 2-4 and section IV-A4 (t-SNE).
    """
    kept = np.isin(labels, usable_classes(labels))
    points, labels = features[kept], labels[kept]
    if np.ptp(points, axis=0).max() == 0:
        return 0.0
    points = _reduced(points, reduce, seed).astype(np.float64)
    return VARIANTS[variant](_classes(points, labels))


def usable_classes(labels: Labels) -> Labels:
    """Classes with at least two samples, ascending. Raises InputError if there are fewer than two of them."""
    classes, counts = np.unique(labels, return_counts=True)
    usable = classes[counts >= 2]
    if len(usable) < 2:
        raise InputError(
            f"the activation cluster measure needs at least 2 classes with at least 2 samples each; "
            f"{len(usable)} of {len(classes)} classes have that many"
        )
    return usable.astype(np.int64)


def validation_rows(labels: Labels, *, seed: int = 0) -> NDArray[np.int64]:
    """Rows, ascending, of the fixed subset of the training set on which ACM is measured.

    At most 100 per class; with more than ten classes, 50 for each of the ten smallest labels.
    Raises InputError unless two classes have two samples each. Source: Dang et al., section IV-A4.
    """
    usable = usable_classes(labels)
    per_class = 100 if len(usable) <= FIRST_CLASSES else 50
    chosen = []
    for label in usable[:FIRST_CLASSES]:
        rows = np.flatnonzero(labels == label)
        chosen.append(numpy_rng(seed, "acm-validation", label).permutation(rows)[:per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _reduced(features: NDArray[np.floating], reduce: str, seed: int) -> NDArray[np.floating]:
    if reduce == "none" or features.shape[1] < 2:
        return features
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    state = derive(seed, "acm-reduce") % 2**32
    with threadpool_limits(1):  # t-SNE sums in the order in which threads finish, and amplifies the difference
        if reduce == "pca2":
            planar: NDArray[np.floating] = PCA(2, random_state=state).fit_transform(features)
        else:
            perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
            tsne = TSNE(
                perplexity=perplexity, init="pca", learning_rate="auto", max_iter=ITERATIONS, random_state=state
            )
            planar = tsne.fit_transform(features)
    return planar


def _classes(points: Points, labels: Labels) -> _Classes:
    members = tuple(points[labels == label] for label in np.unique(labels))
    centres = np.stack([own.mean(0) for own in members])
    distances = [np.linalg.norm(own - centre, axis=1) for own, centre in zip(members, centres, strict=True)]
    spread, radius = (np.array([reduce(d) for d in distances]) for reduce in (np.mean, np.max))
    return _Classes(centres, spread, radius, members)


def _between(classes: _Classes) -> Points:
    """Distance between centres for every pair i < j."""
    rows, columns = np.triu_indices(len(classes.centres), 1)
    return np.asarray(np.linalg.norm(classes.centres[rows] - classes.centres[columns], axis=1))


def _pair_sums(values: Points) -> Points:
    rows, columns = np.triu_indices(len(values), 1)
    return np.asarray(values[rows] + values[columns])


def _mean_ratio(between: Points, inside: Points) -> float:
    return float(np.mean(_ratio(between, _pair_sums(inside))))


def _ratio(above: Points | np.float64, below: Points | np.float64) -> Points:
    """Quotient; x / 0 is infinite with the sign of x, 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.asarray(np.divide(above, below))
    return np.where(np.isnan(quotient), 0.0, quotient)
