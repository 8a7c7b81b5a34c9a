"""Real data that several tests train on; whoever needs it is skipped, and says so, where it is not there."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.records import Shard
from pipeline.relearning.collection import load_labelled
from pipeline.storage.store import Store
from tests.support.data import set_at_hand


def cifar10(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images uint8 [n, 3, 32, 32] and labels int64 [n] of `train` or `test`, in shard order."""
    folder = set_at_hand("cifar10")
    shards = [Shard(path.name, 0, "") for path in sorted(folder.glob(f"cifar10-{split}-*.tar.gz"))]
    found = load_labelled(Store(str(folder)), shards, side=32)
    return torch.from_numpy(found.images[:count]), torch.from_numpy(found.labels[:count])
