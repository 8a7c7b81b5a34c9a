"""Shards that a worker measures together."""

from __future__ import annotations

import pytest

from actors.measurer import groups_of
from pipeline.records import Shard


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([8, 8, 8], ["abc"]),
        ([499, 1, 8], ["ab", "c"]),
        ([0, 499, 600, 3, 2], ["bc", "de"]),
        ([1000, 1000, 1000], ["a", "b", "c"]),
        ([0], []),
        ([], []),
    ],
)
def test_shards_are_measured_in_groups_of_at_least_500_images_but_for_the_last(images, expected):
    shards = [Shard(name, 0, "") for name, _ in zip("abcde", images, strict=False)]
    assert ["".join(shard.name for shard in group) for group in groups_of(shards, images)] == expected
