"""A worker's peak memory does not follow the size of its shards."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_shard_of_ten_times_as_many_images_takes_the_same_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from bench_memory import ALLOWED, peaks

    small, large = 200, 2_000
    for actor, found in peaks((small, large)).items():
        assert abs(found[large] / found[small] - 1) <= ALLOWED / 2, actor  # pixels of 1,800 images more: 350 MB
