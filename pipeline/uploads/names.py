"""Names of uploads: images, shards and the rest; what they are called in the output; which are refused."""

from __future__ import annotations

import mimetypes

from pipeline.layout import RUN_FOLDER
from pipeline.records import IMAGE_SUFFIXES
from pipeline.settings import jpeg_quality
from pipeline.shards.names import is_shard

IMAGE, SHARD = "image", "shard"


def upload_kind(name: str) -> str | None:
    """IMAGE or SHARD; None for what is neither, in the folder of a run's records, or a Mac's note beside a file."""
    if name.startswith(f"{RUN_FOLDER}/") or name.rpartition("/")[2].startswith("._"):
        return None
    if _extension(name) in IMAGE_SUFFIXES:
        return IMAGE
    return SHARD if is_shard(name) else None


def sample_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a loose image: cut at its last dot, so that no two images of a folder share a key but twins."""
    stem, _, extension = name.rpartition(".")
    return stem, extension


def output_name(name: str, encode: str) -> str:
    """What a loose image is called in the output; no two images are called the same.

    same keeps every name. Where the format may change, its extension is appended (`a.jpg` -> `a.jpg.png`) unless the
    name has it already; a name with two (`a.jpg.png`) gets a third, because it may be what another one becomes.
    """
    if encode == "same":
        return name
    fitting = ("png",) if jpeg_quality(encode) is None else ("jpg", "jpeg")
    stem, _, extension = name.rpartition(".")
    if extension.lower() in fitting and _extension(stem) not in IMAGE_SUFFIXES:
        return name
    return f"{name}.{fitting[0]}"


def content_type(name: str) -> str | None:
    """Media type by extension, e.g. image/png."""
    return mimetypes.types_map.get("." + _extension(name)) or {"webp": "image/webp"}.get(_extension(name))


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""
