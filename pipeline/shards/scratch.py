"""Local scratch space for an output that is being written."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.records import Shard


@contextlib.contextmanager
def scratch_for(shard: Shard) -> Iterator[Path]:
    """A temporary folder for the output. Raises StoreError, naming the folder, if the disk is full."""
    try:
        with tempfile.TemporaryDirectory(prefix="scumble-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"cannot write {shard.name} to scratch space {tempfile.gettempdir()}: {error.strerror}; make room for one "
            "shard per worker, or set TMPDIR to another disk, then run the same command again"
        ) from None
