"""Object names: which are shards, and which are never read or written."""

from __future__ import annotations

import re

from pipeline.errors import Reason
from pipeline.storage.listings import SHARD_SUFFIXES

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_CUT_BY_S3FS = "?versionId="


def is_shard(name: str) -> bool:
    """True for the name of a readable tar, ignoring case."""
    return name.lower().endswith(SHARD_SUFFIXES)


def fault_of(name: str) -> tuple[Reason, str] | None:
    """Why an object with this name is never read or written, or None."""
    parts = name.split("/")
    if ".." in parts or "." in parts or "" in parts:
        return Reason.UNSAFE_NAME, "the name leaves its prefix, or would change in a file system"
    if _UNSAFE.search(name):
        return Reason.UNSAFE_NAME, "the name contains a backslash or a control character"
    if _CUT_BY_S3FS in name:
        return Reason.UNSAFE_NAME, f"the name contains {_CUT_BY_S3FS}, which clients mistake for a version and strip"
    if _NOT_UTF8.search(name):
        return Reason.UNUSABLE_NAME, "the name is not UTF-8"
    return None
