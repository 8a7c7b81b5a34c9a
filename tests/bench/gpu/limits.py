"""What limits a stage: the surrogate on tensors that lie on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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
