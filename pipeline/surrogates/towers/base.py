"""What all libraries' towers share: preprocessing, reading weights, and keeping the classifier."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

RANDOM = re.compile(r"random-(\d+)")  # the tag of untrained weights


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: resize the shorter side to `resize`, centre-crop `size`, (x - mean) / std.

    squash  resize both sides to `size` instead, without cropping
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str  # bicubic | bilinear
    squash: bool = False

    def at(self, size: int | None) -> Preprocessing:
        """The same for another input size, cropping the same share."""
        return self if size is None else replace(self, size=size, resize=round(size * self.resize / self.size))


Assembled = tuple[nn.Module, Preprocessing, tuple[NDArray[np.float32], NDArray[np.float32]] | None]


def fetch_url(url: str) -> str:
    """Path of the file in torch's cache; downloaded and checked against the digest in its name if needed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest[1] if digest else None, progress=False)
    return str(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a .pt file containing only tensors."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("state_dict", loaded))


def interpolation(name: str) -> str:
    """The weights' interpolation if supported, else bicubic."""
    return name if name in ("bicubic", "bilinear") else "bicubic"


def head_of(layer: nn.Linear) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [k, d] and bias [k] of a classifier, float32."""
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
    return layer.weight.detach().float().numpy().copy(), bias.numpy().copy()
