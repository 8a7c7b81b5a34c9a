"""What limits a stage: the codecs alone on all cores. Its processes load no torch, which would take them seconds."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from PIL import Image

from pipeline.pictures.picture import decode_rgb


def codecs_alone(files: Sequence[bytes], at_least: int, cpus: int) -> dict[str, float]:
    """Images per second of all cores: decoding as `embed` does, and decoding and encoding as `apply` does."""
    share = [files[number::cpus] for number in range(cpus)]
    with ProcessPoolExecutor(cpus, mp_context=get_context("spawn")) as pool:
        list(pool.map(_decode, share, [at_least] * cpus))  # starts the processes
        found = {}
        for name, seconds in (
            ("decode at the surrogate's size", list(pool.map(_decode, share, [at_least] * cpus))),
            ("decode, encode at quality 95", list(pool.map(_recode, share))),
        ):
            found[name] = len(files) / max(seconds)
    return found


def _decode(files: Sequence[bytes], at_least: int) -> float:
    started = time.perf_counter()
    for data in files:
        decode_rgb(data, at_least=at_least, max_pixels=10**8, suffix="jpg")
    return time.perf_counter() - started


def _recode(files: Sequence[bytes]) -> float:
    started = time.perf_counter()
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            image.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
    return time.perf_counter() - started
