"""Reads the hash-sample of pictures that deltas are fitted on: shards in, uint8 pictures out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.cluster.batches import Batch, RunContext, shards_of
from pipeline import layout
from pipeline.errors import InputError, SampleError
from pipeline.fitting.fit_images import chosen_images, read_fit_images
from pipeline.records import Rejection, Sample
from pipeline.shards.samples import samples_of
from pipeline.storage.store import Store
from pipeline.surrogates.features import assignment_from_parquet


def cluster_sizes(output: Store, shards: list[str]) -> Counter[int]:
    """Ray task: images per cluster in some shards, from their assignments."""
    sizes: Counter[int] = Counter()
    for shard in shards:
        sizes.update(assignment_from_parquet(output.read(layout.assignment(shard))).clusters.tolist())
    return sizes


class FitImageReader:
    """Ray Data actor: one shard in, a block of its chosen pictures out (columns pixels, cluster, shard, key).

    whole  as for read_fit_images
    """

    def __init__(self, context: RunContext, side: int, shares: dict[int, float], whole: bool = False) -> None:
        self.context = context
        self.side = side
        self.shares = shares
        self.whole = whole

    def __call__(self, batch: Batch) -> dict[str, Any]:
        settings = self.context.settings
        columns: dict[str, list[Any]] = {"pixels": [], "cluster": [], "shard": [], "key": []}
        for shard in shards_of(batch):
            assignment = assignment_from_parquet(self.context.output.read(layout.assignment(shard.name)))
            chosen = chosen_images(assignment, self.shares, settings.seed)
            if not chosen:
                continue  # the shard is not even opened
            samples = samples_of(self.context.source, shard, max_member_bytes=settings.max_member_bytes)
            for key, pixels, cluster in self._all_of(chosen, samples, shard.name):
                columns["pixels"].append(pixels.tobytes())
                columns["cluster"].append(cluster)
                columns["shard"].append(shard.name)
                columns["key"].append(key)
        return {
            "pixels": np.array(columns["pixels"], dtype=object),
            "cluster": np.array(columns["cluster"], dtype=np.int64),
            "shard": np.array(columns["shard"], dtype=object),
            "key": np.array(columns["key"], dtype=object),
        }

    def _all_of(
        self, chosen: dict[str, int], samples: Iterator[Sample | Rejection], shard: str
    ) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
        """Like read_fit_images. Raises InputError if a chosen picture cannot be read: it could when it was embedded."""
        left, why, settings = set(chosen), "", self.context.settings
        try:
            for found in read_fit_images(samples, chosen, side=self.side, settings=settings, whole=self.whole):
                left.discard(found[0])
                yield found
        except SampleError as error:
            why = f" ({error})"
        if left:
            raise InputError(
                f"{shard}: {len(left):,} images were embedded but cannot be read now{why}, among them {min(left)}; "
                "check the shard, then run again with a new --output"
            )
