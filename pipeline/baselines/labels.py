"""What stands for a label: the class of a sample, the surrogate's guess, or nothing. Clusters come from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.clusters.clustering import Clustering, ClusterSpace, Head
from pipeline.errors import SampleError
from pipeline.pictures.members import open_sample
from pipeline.records import Features, Rejection, Sample
from pipeline.relearning.labels.given import Classes, given_label
from pipeline.settings import ApplySettings
from pipeline.surrogates.features import Assignment


def labelled(
    samples: Iterable[Sample | Rejection], shard: str, where: str, classes: Classes | None, settings: ApplySettings
) -> Assignment:
    """The label of every usable sample of a shard, as its cluster, at distance 0.

    where    the shard is, for messages
    classes  as class_numbers finds them; None: put all samples into cluster 0
    Raises InputError for a sample without a label. What cannot be protected is left out; `apply` says why.
    """
    found: dict[str, int] = {}
    for sample in samples:
        if isinstance(sample, Rejection):
            continue
        try:
            open_sample(sample, settings=settings)
        except SampleError:
            continue
        found[sample.key] = 0 if classes is None else given_label(sample, classes, where)
    return _assignment(shard, tuple(found), np.array(list(found.values()), np.int32))


def predicted(features: Features, head: Head) -> Assignment:
    """The class that the surrogate's classifier finds most likely, of every sample of a shard."""
    weight, bias = head
    scores = features.values.astype(np.float32) @ weight.T + bias
    return _assignment(features.shard, features.keys, scores.argmax(axis=1).astype(np.int32))


def _assignment(shard: str, keys: tuple[str, ...], labels: NDArray[np.int32]) -> Assignment:
    return Assignment(shard, keys, labels, np.zeros(len(keys), np.float32))


def label_clustering(num_labels: int) -> Clustering:
    """Clusters that are labels: no feature tells them apart, so nothing else can be assigned to them."""
    return Clustering(
        ClusterSpace(),
        centroids=np.zeros((num_labels, 0), np.float32),
        feature_means=np.zeros((num_labels, 0), np.float32),
        distance_p99=np.zeros(num_labels, np.float32),
    )
