"""The name of a surrogate -> its image tower, its weights' own preprocessing and, of a classifier, its last layer.

    open_clip:MODEL/PRETRAINED    torchvision:MODEL/WEIGHTS    timm:MODEL or timm:MODEL.TAG

Weights come from a file, from this package, or from the library's own cache (which may fetch them); nothing is ever
unpickled. PRETRAINED, WEIGHTS or TAG `random-SEED` gives untrained weights, for tests and for measuring speed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import open_clip
import timm
import torch
import torchvision
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from open_clip.pretrained import download_pretrained
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError, SettingsError
from pipeline.fingerprint import derive, sha256
from pipeline.settings import EMBEDDED_SURROGATE, near_matches

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "tf_efficientnet_lite0_in1k_fp16.safetensors"
EMBEDDED_SHA256 = "bfe99bcbadd301f3584cbbff6f61da7b8151477fce702885d3fedf29b80dc994"
_RANDOM = re.compile(r"random-(\d+)")
# What torchvision itself sets when it loads these networks' ImageNet weights.
_TORCHVISION_OPTIONS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: shorter side to `resize`, centre crop of `size`, (x - mean) / std.

    squash  resize both sides to `size` instead and crop nothing
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str  # bicubic | bilinear
    squash: bool = False

    def at(self, size: int | None) -> Preprocessing:
        """The same for another input size, with the same share cropped away."""
        return self if size is None else replace(self, size=size, resize=round(size * self.resize / self.size))


@dataclass(frozen=True)
class Tower:
    """A network that ends in its features [B, d].

    head  weight [k, d] and bias [k] of the classifier that was cut off, or None
    """

    network: nn.Module
    preprocessing: Preprocessing
    head: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    weights_sha256: str


def check_surrogate(name: str) -> None:
    """Raises SettingsError, with near matches, unless `name` is a surrogate that could be built. Reads no weights."""
    kind, model, tag = _split(name)
    known = _models(kind)
    if model not in known:
        raise SettingsError(f"--surrogate {name!r}: {kind} has no model {model!r}{near_matches(model, known)}")
    if _RANDOM.fullmatch(tag) or (kind == "timm" and not tag):
        return
    tags = _tags(kind, model)
    if tag not in tags:
        known_tags = near_matches(tag, tags) or _listed(tags)
        raise SettingsError(f"--surrogate {name!r}: {kind} {model} has no weights {tag!r}{known_tags}")


def build(name: str, *, weights: Path | None, size: int | None) -> Tower:
    """The image tower of `name` on the CPU, with weights from the file `weights` or from where the library keeps them.

    Raises SettingsError for an unknown name or a size that the network cannot take, InputError for weights that
    cannot be had or do not fit, ConflictError if the weights shipped here were altered.
    """
    check_surrogate(name)
    kind, model, tag = _split(name)
    random = _RANDOM.fullmatch(tag)
    path = None if random else weights_file(name, weights)
    assemble = {"open_clip": _open_clip, "torchvision": _torchvision, "timm": _timm}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(int(random[1]) if random else 0, "surrogate weights", model))
        try:
            network, preprocessing, head = assemble(model, tag, path, size)
        except (KeyError, RuntimeError, ValueError, AssertionError, UnpicklingError, SafetensorError) as error:
            raise _misfit(name, path, size, error) from None
    digest = _digest(network.state_dict()) if path is None else sha256(path.read_bytes())
    return Tower(network.eval().requires_grad_(False), preprocessing, head, digest)


def _misfit(name: str, path: Path | None, size: int | None, error: Exception) -> SettingsError | InputError:
    reason = " ".join(str(error).split())[:200]
    if size is not None:
        return SettingsError(f"--surrogate-size {size} does not suit {name}: {reason}")
    if path is None:
        return SettingsError(f"--surrogate {name} cannot be built: {reason}")
    return InputError(f"{path} does not hold the weights of {name} as safetensors or a plain state dict: {reason}")


def _split(name: str) -> tuple[str, str, str]:
    """(kind, model, tag); the tag of timm may be empty."""
    kind, _, rest = name.partition(":")
    kinds = ["open_clip", "torchvision", "timm"]
    if kind not in kinds or not rest:
        raise SettingsError(
            f"--surrogate {name!r} is none of open_clip:MODEL/PRETRAINED, torchvision:MODEL/WEIGHTS, timm:MODEL"
            + near_matches(kind, kinds)
        )
    model, separator, tag = rest.partition("." if kind == "timm" else "/")
    if kind != "timm" and not (separator and tag):
        tags = _tags(kind, model) if model in _models(kind) else []
        raise SettingsError(f"--surrogate {name!r} lacks the weights: {kind}:{model}/WEIGHTS{_listed(tags)}")
    return kind, model, tag


def _listed(tags: list[str]) -> str:
    more = ", …" if len(tags) > 6 else ""
    return f"; it has {', '.join(tags[:6])}{more}" if tags else ""


def _models(kind: str) -> list[str]:
    if kind == "open_clip":
        return list(open_clip.list_models())
    if kind == "timm":
        return list(timm.list_models())
    return list(torchvision.models.list_models(module=torchvision.models))


def _tags(kind: str, model: str) -> list[str]:
    if kind == "open_clip":
        return list(open_clip.list_pretrained_tags_by_model(model))
    if kind == "timm":
        return [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    return [weights.name for weights in torchvision.models.get_model_weights(model)]


def weights_file(name: str, weights: Path | None) -> Path:
    """The file with the weights of `name`: given, shipped, cached or fetched.

    Raises InputError if it is not here and cannot be fetched.
    """
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"--surrogate-weights {weights}: there is no such file")
        return weights
    if name == EMBEDDED_SURROGATE:
        if not EMBEDDED_WEIGHTS.is_file() or sha256(EMBEDDED_WEIGHTS.read_bytes()) != EMBEDDED_SHA256:
            raise ConflictError(f"{EMBEDDED_WEIGHTS} is missing or not as published; install scumble again")
        return EMBEDDED_WEIGHTS
    kind, model, tag = _split(name)
    fetch: Callable[[str, str], str] = {
        "open_clip": _fetch_open_clip,
        "torchvision": _fetch_torchvision,
        "timm": _fetch_timm,
    }[kind]
    try:
        return Path(fetch(model, tag))
    except (OSError, EntryNotFoundError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"the weights of {name} are not on this machine and could not be fetched ({reason}): get them elsewhere "
            f"({_source(kind, model, tag)}) and give --surrogate-weights FILE, "
            f"or take --surrogate {EMBEDDED_SURROGATE}, which needs no file"
        ) from None


def _source(kind: str, model: str, tag: str) -> str:
    """Where the weights are published."""
    if kind == "torchvision":
        return str(torchvision.models.get_model_weights(model)[tag].url)
    if kind == "timm":
        found = timm.get_pretrained_cfg(_timm_name(model, tag))
        return f"{found.hf_hub_id or found.url}, model.safetensors"
    config = open_clip.get_pretrained_cfg(model, tag)
    hub = config.get("hf_hub", "").rstrip("/")
    return f"{hub}, open_clip_model.safetensors" if hub else str(config.get("url"))


def _fetch_open_clip(model: str, tag: str) -> str:
    return str(download_pretrained(open_clip.get_pretrained_cfg(model, tag)))


def _fetch_torchvision(model: str, tag: str) -> str:
    return _fetch_url(torchvision.models.get_model_weights(model)[tag].url)


def _fetch_timm(model: str, tag: str) -> str:
    config = timm.get_pretrained_cfg(_timm_name(model, tag))
    if not config.hf_hub_id:
        if not config.url:
            raise FileNotFoundError("no weights were ever published")
        return _fetch_url(config.url)
    repository, _, revision = config.hf_hub_id.partition("@")
    for filename in (config.hf_hub_filename or "model.safetensors", "pytorch_model.bin"):
        try:
            return str(hf_hub_download(repository, filename, revision=revision or None))
        except EntryNotFoundError as error:
            missing = error
    raise missing


def _fetch_url(url: str) -> str:
    """The file in torch's cache, fetched and checked against the digest in its name if it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest[1] if digest else None, progress=False)
    return str(path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or from a .pt file that holds nothing but tensors."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("state_dict", loaded))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


Assembled = tuple[nn.Module, Preprocessing, tuple[NDArray[np.float32], NDArray[np.float32]] | None]


def _open_clip(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The visual tower up to the joint embedding; the text tower is dropped."""
    config = open_clip.get_pretrained_cfg(model, tag)
    whole = open_clip.create_model(
        model,
        pretrained=None if path is None else str(path),
        force_quick_gelu=config.get("quick_gelu", False),  # OpenAI's weights are quietly wrong without it
        force_image_size=size,
        pretrained_image=False,
        pretrained_text=False,
        weights_only=True,
    )
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"its resize mode {mode!r} is not supported")
    side = whole.visual.image_size
    side = int(side[0] if isinstance(side, (tuple, list)) else side)
    preprocessing = Preprocessing(
        size=side,
        resize=side,
        mean=tuple(config.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(config.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=_interpolation(config.get("interpolation", "bicubic")),
        squash=mode == "squash",
    )
    return whole.visual, preprocessing, None


def _torchvision(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The network with its last linear layer cut off."""
    available = torchvision.models.get_model_weights(model)
    transform = (available.DEFAULT if _RANDOM.fullmatch(tag) else available[tag]).transforms()
    network = torchvision.models.get_model(model, weights=None, **_TORCHVISION_OPTIONS.get(model, {}))
    if path is not None:
        network.load_state_dict(_read_weights(path))
    preprocessing = Preprocessing(
        size=int(transform.crop_size[0]),
        resize=int(transform.resize_size[0]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=_interpolation(transform.interpolation.value),
    )
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != len(available.DEFAULT.meta["categories"]):
        raise ValueError("it does not end in a linear layer; take another network")
    name, last = layers[-1]
    network.set_submodule(name, nn.Identity())
    return network, preprocessing.at(size), _head(last)


def _timm(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The network with its classifier cut off."""
    name = _timm_name(model, tag)
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": size} if size is not None and config.fixed_input_size else {}
    if path is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _read_weights(path)}}
    network = timm.create_model(name, **options)
    head = network.get_classifier()
    network.reset_classifier(0)
    side = int(config.input_size[1])
    preprocessing = Preprocessing(
        size=side,
        resize=int(side / config.crop_pct),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=_interpolation(config.interpolation),
        squash=config.crop_mode == "squash",
    )
    return network, preprocessing.at(size), _head(head) if isinstance(head, nn.Linear) else None


def _timm_name(model: str, tag: str) -> str:
    return model if not tag or _RANDOM.fullmatch(tag) else f"{model}.{tag}"


def _interpolation(name: str) -> str:
    return name if name in ("bicubic", "bilinear") else "bicubic"


def _head(layer: nn.Linear) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float()
    return layer.weight.detach().float().numpy().copy(), bias.numpy().copy()
