"""Names of uploads: which are images or shards, and what they are called in the output."""

from __future__ import annotations

import mimetypes

from pipeline.layout import RUN_FOLDER
from pipeline.records import IMAGE_SUFFIXES
from pipeline.settings import jpeg_quality
from pipeline.shards.names import is_shard

IMAGE, SHARD = "image", "shard"


def upload_kind(name: str) -> str | None:
    """IMAGE or SHARD; None for anything else, a run's records, or macOS metadata files."""
    if name.startswith(f"{RUN_FOLDER}/") or name.rpartition("/")[2].startswith("._"):
        return None
    if _extension(name) in IMAGE_SUFFIXES:
        return IMAGE
    return SHARD if is_shard(name) else None


def sample_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a loose image, split at the last dot, so that only `a.jpg` and `a.png` can share a key."""
    stem, _, extension = name.rpartition(".")
    return stem, extension


def output_name(name: str, encode: str) -> str:
    """Name of a loose image in the output; unique for every image.

    `same` keeps every name. If the format may change, the new extension is appended (`a.jpg` -> `a.jpg.png`) unless the
    name already ends with it; a name with two image extensions (`a.jpg.png`) gets a third, because another image may
    become that name.
    """
    if encode == "same":
        return name
    fitting = ("png",) if jpeg_quality(encode) is None else ("jpg", "jpeg")
    stem, _, extension = name.rpartition(".")
    if extension.lower() in fitting and _extension(stem) not in IMAGE_SUFFIXES:
        return name
    return f"{name}.{fitting[0]}"


def content_type(name: str) -> str | None:
    """Media type by extension, e.g. image/png, or None."""
    return mimetypes.types_map.get("." + _extension(name)) or {"webp": "image/webp"}.get(_extension(name))


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""
