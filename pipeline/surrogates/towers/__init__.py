"""Image towers by library; a library's module is imported only when one of its surrogates is used.

Every module has the same five functions:
models()             names of the networks it can build
tags(model)          names of the published weights of a network
source(model, tag)   where those weights are published
fetch(model, tag)    path of their file in the library's cache, downloaded if needed; OSError if that fails
assemble(...)        the network that outputs features, its preprocessing, and the classifier removed from it
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

LIBRARIES = {"open_clip": "clip", "torchvision": "vision", "timm": "timm_models"}


def library(kind: str) -> Any:
    """The module for `open_clip`, `torchvision` or `timm`."""
    return import_module(f"pipeline.surrogates.towers.{LIBRARIES[kind]}")
