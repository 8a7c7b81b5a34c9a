"""Names of uploads: which are images or shards."""

from __future__ import annotations

from pipeline.layout import RUN_FOLDER
from pipeline.shards.names import is_image, is_of_the_system, is_shard

IMAGE, SHARD = "image", "shard"


def is_no_upload(name: str) -> bool:
    """True for a run's records and files that systems leave in any folder."""
    return name.startswith(f"{RUN_FOLDER}/") or is_of_the_system(name)


def upload_kind(name: str) -> str | None:
    """IMAGE or SHARD; None for anything else."""
    if is_no_upload(name):
        return None
    if is_image(name):
        return IMAGE
    return SHARD if is_shard(name) else None
