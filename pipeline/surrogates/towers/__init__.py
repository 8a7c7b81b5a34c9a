"""Image towers by library; each of these modules is imported only when a surrogate of its library is asked for.

Every module of a library has the same five functions:
models()             names of the networks it can build
tags(model)          names of the weights that it knows for one
source(model, tag)   where those weights are published
fetch(model, tag)    path of their file in the library's own cache, fetched if it is not there; OSError if it cannot be
assemble(...)        the network that ends in its features, how it wants its input, and the classifier cut off it
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

LIBRARIES = {"open_clip": "clip", "torchvision": "vision", "timm": "timm_models"}


def library(kind: str) -> Any:
    """The module of `open_clip`, `torchvision` or `timm`."""
    return import_module(f"pipeline.surrogates.towers.{LIBRARIES[kind]}")
