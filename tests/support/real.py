"""Real data that several tests train on; whoever needs it is skipped, and says so, where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.relearning.collection import load_labelled
from pipeline.storage.store import Store

DATA = Path(__file__).parents[3] / "shared" / "data"


def cifar10(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images uint8 [n, 3, 32, 32] and labels int64 [n] of `train` or `test`, in shard order."""
    folder = DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip("the CIFAR-10 shards are not beside this checkout")
    names = sorted(path.name for path in folder.glob(f"cifar10-{split}-*.tar.gz"))
    found = load_labelled(Store(str(folder)), names, side=32)
    return torch.from_numpy(found.images[:count]), torch.from_numpy(found.labels[:count])
