"""Image towers of timm's classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from pipeline.surrogates.towers.base import (
    RANDOM,
    Assembled,
    Preprocessing,
    fetch_from_hub,
    fetch_url,
    head_of,
    interpolation,
    read_weights,
)


def models() -> list[str]:
    """Names of the models the library knows."""
    return list(timm.list_models())


def tags(model: str) -> list[str]:
    """Names of the published weights of a model."""
    return [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]


def source(model: str, tag: str) -> str:
    """Where the weights are published, for error messages."""
    config = timm.get_pretrained_cfg(_full_name(model, tag))
    return f"{config.hf_hub_id or config.url}, model.safetensors"


def fetch(model: str, tag: str) -> str:
    """Path of the weights file in the library's cache, downloaded if needed."""
    config = timm.get_pretrained_cfg(_full_name(model, tag))
    if not config.hf_hub_id:
        if not config.url:
            raise FileNotFoundError("no weights have been published")
        return fetch_url(config.url)
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename or "model.safetensors", "pytorch_model.bin")
    return fetch_from_hub(repository, names, revision or None)


def assemble(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The network without its classifier."""
    name = _full_name(model, tag)
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": size} if size is not None and config.fixed_input_size else {}
    if path is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": read_weights(path)}}
    network = timm.create_model(name, **options)
    head = network.get_classifier()
    network.reset_classifier(0)
    side = int(config.input_size[1])
    preprocessing = Preprocessing(
        size=side,
        resize=int(side / config.crop_pct),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=interpolation(config.interpolation),
        squash=config.crop_mode == "squash",
    )
    return network, preprocessing.at(size), head_of(head) if isinstance(head, nn.Linear) else None


def _full_name(model: str, tag: str) -> str:
    return model if not tag or RANDOM.fullmatch(tag) else f"{model}.{tag}"
