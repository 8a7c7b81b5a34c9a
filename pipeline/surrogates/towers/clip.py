"""Image towers of open_clip."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained

from pipeline.surrogates.towers.base import Assembled, Preprocessing, announce, fetch_from_hub, interpolation


def models() -> list[str]:
    """Names of the models the library knows."""
    return list(open_clip.list_models())


def tags(model: str) -> list[str]:
    """Names of the published weights of a model."""
    return list(open_clip.list_pretrained_tags_by_model(model))


def source(model: str, tag: str) -> str:
    """Where the weights are published, for error messages."""
    config = open_clip.get_pretrained_cfg(model, tag)
    hub = config.get("hf_hub", "").rstrip("/")
    return f"{hub}, open_clip_model.safetensors" if hub else str(config.get("url"))


def fetch(model: str, tag: str) -> str:
    """Path of the weights file in the library's cache, downloaded if needed."""
    config = open_clip.get_pretrained_cfg(model, tag)
    repository, _, name = config.get("hf_hub", "").rpartition("/")
    if repository:  # as the library does it, but without trying each name six times where there is no network
        name = name or HF_WEIGHTS_NAME
        safe = HF_SAFE_WEIGHTS_NAME if name == HF_WEIGHTS_NAME else re.sub(r"\.(bin|pth)$", ".safetensors", name)
        return fetch_from_hub(repository, list(dict.fromkeys((safe, name))))
    announce(str(config.get("url")))
    return str(download_pretrained(config))


def assemble(model: str, tag: str, path: Path | None, size: int | None) -> Assembled:
    """The visual tower up to the joint embedding; the text tower is dropped."""
    config = open_clip.get_pretrained_cfg(model, tag)
    whole = open_clip.create_model(
        model,
        pretrained=None if path is None else str(path),
        force_quick_gelu=config.get("quick_gelu", False),  # OpenAI's weights are silently wrong without it
        force_image_size=size,
        pretrained_image=False,
        pretrained_text=False,
        weights_only=True,
    )
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize mode {mode!r} is not supported")
    side = whole.visual.image_size
    side = int(side[0] if isinstance(side, (tuple, list)) else side)
    preprocessing = Preprocessing(
        size=side,
        resize=side,
        mean=tuple(config.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(config.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=interpolation(config.get("interpolation", "bicubic")),
        squash=mode == "squash",
    )
    return whole.visual, preprocessing, None
