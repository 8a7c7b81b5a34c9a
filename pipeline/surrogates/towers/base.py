"""What all libraries' towers share: preprocessing, reading weights, and keeping the classifier."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

_ANSWER_SECONDS = 10.0
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
        announce(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest[1] if digest else None, progress=False)
    return str(path)


def fetch_from_hub(repository: str, names: Sequence[str], revision: str | None = None) -> str:
    """Path in the hub's cache of the first of some files that a repository has; downloaded if none of them is there.

    Raises ConnectionError if the hub does not answer, without the half minute of retries for each name that it would
    get otherwise; EntryNotFoundError if the repository has none of the files, OSError if a download fails.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry; what fails is raised anyway
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name, revision=revision), str):
            return cached
    announce(f"{repository} on {urlparse(constants.ENDPOINT).netloc}")
    if not constants.HF_HUB_OFFLINE:
        _check_answers(constants.ENDPOINT)
    missing = EntryNotFoundError(f"{repository} has no {' and no '.join(names)}")
    for name in names:
        try:
            return str(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            missing = error
    raise missing


def _check_answers(url: str) -> None:
    """Raise ConnectionError unless a server answers there; any answer will do, and so will a certificate."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=_ANSWER_SECONDS).close()
    except HTTPError:
        return
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        if not isinstance(reason, ssl.SSLError):  # the hub's own client may trust other certificates
            raise ConnectionError(f"{url} does not answer: {reason}") from None


def announce(source: str) -> None:
    """Tell, where the program shows it, that weights are being downloaded."""
    logging.getLogger("scumble.weights").info("downloading %s", source)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a .pt file containing only tensors. Raises ValueError for anything else."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except EOFError:
        raise ValueError("the file is empty or ends early") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors by name")
    return dict(loaded.get("state_dict", loaded))


def interpolation(name: str) -> str:
    """The weights' interpolation if supported, else bicubic."""
    return name if name in ("bicubic", "bilinear") else "bicubic"


def head_of(layer: nn.Linear) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [k, d] and bias [k] of a classifier, float32."""
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
    return layer.weight.detach().float().numpy().copy(), bias.numpy().copy()
