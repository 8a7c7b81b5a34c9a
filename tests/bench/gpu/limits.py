"""What limits a stage: the surrogate on tensors that lie on the device, and the codecs alone on all cores."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.pictures.picture import decode_rgb
from pipeline.surrogates.surrogate import Surrogate

ROUNDS = 3


def per_second(run: Callable[[], Any], images: int, device: str, calls: int) -> float:
    """Images per second: the median of rounds of `calls` calls between two synchronisations, after a warm-up."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = []
    for _ in range(ROUNDS + 1):
        synchronise()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise()
        rates.append(calls * images / (time.perf_counter() - started))
    return statistics.median(rates[1:])


@torch.inference_mode()
def model_alone(surrogate: Surrogate, batch: int, calls: int) -> float:
    """Images per second of the model as `embed` runs it, on tensors that lie on the device."""
    kind = surrogate.device.type
    side = (batch, 3, surrogate.input_size, surrogate.input_size)
    images = torch.rand(side, device=surrogate.device).contiguous(memory_format=torch.channels_last)

    def embedded() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            surrogate.embed(images)

    return per_second(embedded, batch, kind, calls)


def prepare_alone(surrogate: Surrogate, pictures: Sequence[np.ndarray[Any, Any]], calls: int) -> float:
    """Pictures per second that are copied to the device and resized there."""
    return per_second(lambda: surrogate.prepare(pictures), len(pictures), surrogate.device.type, calls)


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
