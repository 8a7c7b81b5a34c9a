"""Streams that count and hash what passes through them, or that retry reads."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_FILE_BUFFER = 1 << 19
_WRITE_PARTS = 900  # per call; Linux allows 1024
_DRAIN_BYTES = 1 << 20


class HashingReader(io.RawIOBase):
    """A readable stream that tracks the size and SHA-256 of what has been read through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.size = 0
        self._stream = stream
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def drain(self) -> None:
        """Read to the end: whatever follows an archive's end is part of the file too."""
        block = bytearray(_DRAIN_BYTES)
        while self.readinto(block):
            continue

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class PatientReader(io.RawIOBase):
    """A readable stream that reads through `attempt`, which may retry failed reads.

    stream  must keep its position when a read fails, as fsspec's streams do
    """

    def __init__(self, stream: IO[bytes], attempt: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._stream, self._attempt = stream, attempt

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        return self._attempt(lambda: self._stream.read(-1 if size is None else size))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


class HashedFile(io.RawIOBase):
    """A new file that tracks its size and SHA-256 while being written."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._file = path.open("wb", buffering=_FILE_BUFFER)

    def writable(self) -> bool:
        return True

    def take_note(self, data: bytes) -> None:
        """Hash data to be written later, while it is still in the CPU cache."""
        self.digest.update(data)
        self.size += len(data)

    def write_noted(self, parts: list[bytes]) -> None:
        """Write what was noted, in the same order, without concatenating it."""
        for start in range(0, len(parts), _WRITE_PARTS):
            some = parts[start : start + _WRITE_PARTS]
            written = os.writev(self._file.fileno(), some)
            if written != sum(map(len, some)):
                self._file.write(b"".join(some)[written:])
                self._file.flush()

    def write(self, data: Any) -> int:
        self.take_note(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()
