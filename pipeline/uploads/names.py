"""Names of uploads: images, shards and the rest; what they are called in the output; which are refused."""

from __future__ import annotations

import mimetypes
import re

from pipeline.members import IMAGE_SUFFIXES
from pipeline.records import Reason
from pipeline.settings import jpeg_quality
from pipeline.store import RUN_FOLDER, SHARD_SUFFIXES

IMAGE, SHARD = "image", "shard"

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_CUT_BY_S3FS = "?versionId="


def kind_of(name: str) -> str | None:
    """IMAGE or SHARD; None for what is neither, in the folder of a run's records, or a Mac's note beside a file."""
    if name.startswith(f"{RUN_FOLDER}/") or name.rpartition("/")[2].startswith("._"):
        return None
    if _extension(name) in IMAGE_SUFFIXES:
        return IMAGE
    return SHARD if is_shard(name) else None


def is_shard(name: str) -> bool:
    """True for the name of a tar that can be read, whatever the case of its letters."""
    return name.lower().endswith(SHARD_SUFFIXES)


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


def fault_of(name: str) -> tuple[Reason, str] | None:
    """Why an object of this name is never read or written, or None."""
    parts = name.split("/")
    if ".." in parts or "." in parts or "" in parts:
        return Reason.UNSAFE_NAME, "the name leaves its prefix, or would be another one in a folder"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name holds a backslash or a control character"
    if _CUT_BY_S3FS in name:
        return Reason.UNSAFE_NAME, f"the name holds {_CUT_BY_S3FS}, which clients take for a version and cut off"
    if _NOT_UTF8.search(name):
        return Reason.UNUSABLE_NAME, "the name is not UTF-8"
    return None


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""
