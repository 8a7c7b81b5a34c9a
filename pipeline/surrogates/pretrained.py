"""Surrogate name -> its image tower, the weights' own preprocessing and, for a classifier, the last layer.

    open_clip:MODEL/PRETRAINED    torchvision:MODEL/WEIGHTS    timm:MODEL or timm:MODEL.TAG

Weights come from a file, from this package, or from the library's cache (which may download them); nothing is ever
unpickled. `random-SEED` as PRETRAINED, WEIGHTS or TAG gives untrained weights, for tests and benchmarks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError, SettingsError, one_line
from pipeline.hashing import derive, sha256
from pipeline.settings import EMBEDDED_SURROGATE, near_matches
from pipeline.surrogates.towers import LIBRARIES, library
from pipeline.surrogates.towers.base import RANDOM, Assembled, Preprocessing, read_weights

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "tf_efficientnet_lite0_in1k_fp16.safetensors"
EMBEDDED_SHA256 = "bfe99bcbadd301f3584cbbff6f61da7b8151477fce702885d3fedf29b80dc994"
_EMBEDDED_INPUT = Preprocessing(224, 256, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic")

# what libraries raise for a size or a file that does not suit a network; the last three for an empty file, or one
# without tensors by name
_UNFIT = (
    *(KeyError, RuntimeError, ValueError, AssertionError, UnpicklingError, SafetensorError),
    *(EOFError, AttributeError, TypeError),
)


@dataclass(frozen=True)
class Tower:
    """A network that outputs features [B, d], and what is known of it without the network.

    build             gives the network, on the CPU, in eval mode and without gradients
    head              weight [k, d] and bias [k] of the classifier that was removed, or None
    is_convolutional  nothing in the network stands for a place in the image, so that any input size suits its weights
    dimension         d; None = nobody knows before the network has embedded something
    """

    build: Callable[[], nn.Module]
    preprocessing: Preprocessing
    head: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    weights_sha256: str
    is_convolutional: bool
    dimension: int | None = None

    @cached_property
    def network(self) -> nn.Module:
        """The network, built when it is first asked for."""
        return self.build()


def check_surrogate(name: str) -> None:
    """Raise SettingsError, with near matches, unless `name` is a known surrogate. Reads no weights."""
    if name == EMBEDDED_SURROGATE:  # known without importing its library, which takes seconds
        return
    kind, model, tag = _split(name)
    known = library(kind).models()
    if model not in known:
        raise SettingsError(f"--surrogate {name!r}: {kind} has no model {model!r}{near_matches(model, known)}")
    if RANDOM.fullmatch(tag) or (kind == "timm" and not tag):
        return
    tags = library(kind).tags(model)
    if tag not in tags:
        known_tags = near_matches(tag, tags) or _listed(tags)
        raise SettingsError(f"--surrogate {name!r}: {kind} {model} has no weights {tag!r}{known_tags}")


def build_tower(name: str, *, weights: Path | None, size: int | None) -> Tower:
    """Build the image tower of `name` on the CPU, with weights from a file or from where the library keeps them.

    The network of the bundled weights, of which everything else is known, is built when it is first asked for:
    importing its library takes seconds.
    Raises SettingsError for an unknown name or an unsuitable size, InputError for weights that are unavailable or do
    not fit, ConflictError if the bundled weights were altered.
    """
    check_surrogate(name)
    if name == EMBEDDED_SURROGATE and weights is None:
        return _embedded_tower(size)
    tag = _split(name)[2]
    path = None if RANDOM.fullmatch(tag) else weights_file(name, weights)
    network, preprocessing, head = _assembled(name, path, size)
    digest = _digest(network.state_dict()) if path is None else sha256(path.read_bytes())
    placed = any("pos" in parameter.rpartition(".")[2] for parameter, _ in network.named_parameters())
    return Tower(lambda: network, preprocessing, head, digest, not placed)


def _embedded_tower(size: int | None) -> Tower:
    path = weights_file(EMBEDDED_SURROGATE, None)
    tensors = read_weights(path)
    head = (tensors["classifier.weight"].float().numpy(), tensors["classifier.bias"].float().numpy())
    build = partial(_network, EMBEDDED_SURROGATE, path, size)
    return Tower(build, _EMBEDDED_INPUT.at(size), head, EMBEDDED_SHA256, True, head[0].shape[1])


def _network(name: str, path: Path | None, size: int | None) -> nn.Module:
    return _assembled(name, path, size)[0]


def _assembled(name: str, path: Path | None, size: int | None) -> Assembled:
    """What the library makes of a name; the network is frozen."""
    kind, model, tag = _split(name)
    random = RANDOM.fullmatch(tag)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(int(random[1]) if random else 0, "surrogate weights", model))
        try:
            network, preprocessing, head = library(kind).assemble(model, tag, path, size)
        except _UNFIT as error:
            raise _misfit(name, path, size, error) from None
    return network.eval().requires_grad_(False), preprocessing, head


def _misfit(name: str, path: Path | None, size: int | None, error: Exception) -> SettingsError | InputError:
    reason = one_line(error)
    if size is not None:
        return SettingsError(f"--surrogate-size {size} does not suit {name}: {reason}")
    if path is None:
        return SettingsError(f"cannot build --surrogate {name}: {reason}")
    return InputError(f"{path} does not hold the weights of {name} as safetensors or a plain state dict: {reason}")


def _split(name: str) -> tuple[str, str, str]:
    """(kind, model, tag); timm's tag may be empty."""
    kind, _, rest = name.partition(":")
    kinds = list(LIBRARIES)
    if kind not in kinds or not rest:
        raise SettingsError(
            f"--surrogate {name!r} is not one of open_clip:MODEL/PRETRAINED, torchvision:MODEL/WEIGHTS, timm:MODEL"
            + near_matches(kind, kinds)
        )
    model, separator, tag = rest.partition("." if kind == "timm" else "/")
    if kind != "timm" and not (separator and tag):
        tags = library(kind).tags(model) if model in library(kind).models() else []
        raise SettingsError(
            f"--surrogate {name!r} does not name its weights: use {kind}:{model}/WEIGHTS{_listed(tags)}"
        )
    return kind, model, tag


def _listed(tags: list[str]) -> str:
    more = ", …" if len(tags) > 6 else ""
    return f"; it has {', '.join(tags[:6])}{more}" if tags else ""


def weights_file(name: str, weights: Path | None) -> Path:
    """The file with the weights of `name`: given, bundled, cached or downloaded.

    Raises InputError if it is not available and cannot be downloaded.
    """
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"--surrogate-weights {weights}: file not found")
        return weights
    if name == EMBEDDED_SURROGATE:
        if not EMBEDDED_WEIGHTS.is_file() or sha256(EMBEDDED_WEIGHTS.read_bytes()) != EMBEDDED_SHA256:
            raise ConflictError(f"{EMBEDDED_WEIGHTS} is missing or altered; reinstall scumble")
        return EMBEDDED_WEIGHTS
    kind, model, tag = _split(name)
    try:
        return Path(library(kind).fetch(model, tag))
    except (OSError, EntryNotFoundError, RuntimeError) as error:
        raise InputError(
            f"the weights of {name} are not on this machine and could not be downloaded ({one_line(error, 160)}): "
            f"download them elsewhere ({library(kind).source(model, tag)}) and pass --surrogate-weights FILE, "
            f"or use --surrogate {EMBEDDED_SURROGATE}, which is bundled"
        ) from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
