"""A worker's peak memory does not follow the size of its shards."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_shard_of_ten_times_as_many_images_takes_the_same_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from bench_memory import ALLOWED, LARGE, SMALL, peaks

    for actor, found in peaks().items():
        assert abs(found[LARGE] / found[SMALL] - 1) <= ALLOWED, actor
