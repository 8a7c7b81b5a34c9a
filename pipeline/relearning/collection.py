"""Labelled pictures of a collection as tensors: what a trainer would load from its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.apply import image_suffix
from pipeline.errors import InputError
from pipeline.picture import decode_rgb
from pipeline.records import Rejection
from pipeline.store import Store
from pipeline.tar import read_samples

MAX_PIXELS = 100_000_000
MAX_MEMBER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class LabelledImages:
    """images uint8 [n, 3, S, S]; labels int64 [n]."""

    images: Tensor
    labels: Tensor


def load_labelled(store: Store, shards: Sequence[str], *, side: int) -> LabelledImages:
    """Every sample of the shards that has an image and a `.cls` label, at one side, in shard order.

    Pictures are cut to a square in the middle and resized (bicubic) as they are decoded from the files.
    Raises InputError if a sample cannot be read or has no label.
    """
    images, labels = [], []
    for shard in shards:
        with store.open(shard) as stream:
            for sample in read_samples(stream, max_member_bytes=MAX_MEMBER_BYTES):
                if isinstance(sample, Rejection):
                    raise InputError(f"{store.url}/{shard}: {sample.key}: {sample.detail}")
                if "cls" not in sample.members:
                    raise InputError(f"{store.url}/{shard}: {sample.key} has no .cls label to train on")
                suffix = image_suffix(sample)
                pixels = decode_rgb(sample.members[suffix], at_least=side, max_pixels=MAX_PIXELS, suffix=suffix)
                square = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC)
                images.append(np.asarray(square))
                labels.append(int(sample.members["cls"]))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(stacked, torch.tensor(labels))
