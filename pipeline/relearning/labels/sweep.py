"""How many groups a concept bank falls into: three criteria over the number of groups (Chen et al. 2024, Fig. 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.relearning.labels.concepts import group_concepts, grouping_quality
from pipeline.surrogates.concepts import ConceptBank


class Grouping(NamedTuple):
    """The scores of one number of groups, as `grouping_quality` defines them."""

    groups: int
    sse: float
    silhouette: float
    calinski_harabasz: float


def groupings(bank: ConceptBank, counts: Iterable[int], *, seed: int) -> Iterator[Grouping]:
    """Scores for each number of groups. Raises SettingsError for a number that the bank cannot be divided into."""
    for count in counts:
        groups = group_concepts(bank.embeddings, count, seed=seed)
        yield Grouping(count, **grouping_quality(bank.embeddings, groups))
