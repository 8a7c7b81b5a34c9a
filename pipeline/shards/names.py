"""Names of objects: which is a shard, and which are never read or written."""

from __future__ import annotations

import re

from pipeline.errors import Reason
from pipeline.storage.listings import SHARD_SUFFIXES

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_CUT_BY_S3FS = "?versionId="


def is_shard(name: str) -> bool:
    """True for the name of a tar that can be read, whatever the case of its letters."""
    return name.lower().endswith(SHARD_SUFFIXES)


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
