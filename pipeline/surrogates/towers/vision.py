"""Image towers of torchvision's classifiers."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torchvision import models as published

from pipeline.surrogates.towers.base import (
    RANDOM,
    Assembled,
    Preprocessing,
    fetch_url,
    head_of,
    interpolation,
    read_weights,
)

# What torchvision itself sets when loading ImageNet weights for these networks.
_OPTIONS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


def models() -> list[str]:
    """Names of the models the library knows."""
    return list(published.list_models(module=published))


def tags(model: str) -> list[str]:
    """Names of the published weights of a model."""
    return [weights.name for weights in published.get_model_weights(model)]


def source(model: str, tag: str) -> str:
    """Where the weights are published, for error messages."""
    return str(published.get_model_weights(model)[tag].url)


def fetch(model: str, tag: str) -> str:
    """Path of the weights file in the library's cache, downloaded if needed."""
    return fetch_url(published.get_model_weights(model)[tag].url)


def assemble(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The network without its last linear layer."""
    available = published.get_model_weights(model)
    transform = (available.DEFAULT if RANDOM.fullmatch(tag) else available[tag]).transforms()
    network = published.get_model(model, weights=None, **_OPTIONS.get(model, {}))
    if path is not None:
        network.load_state_dict(read_weights(path))
    preprocessing = Preprocessing(
        size=int(transform.crop_size[0]),
        resize=int(transform.resize_size[0]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=interpolation(transform.interpolation.value),
    )
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != len(available.DEFAULT.meta["categories"]):
        raise ValueError("the network does not end in a linear layer; use another one")
    name, last = layers[-1]
    network.set_submodule(name, nn.Identity())
    return network, preprocessing.at(size), head_of(last)
