"""What a training will take, from a few images and one step measured on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from pipeline.errors import InputError
from pipeline.fitting.fit_images import fit_bytes
from pipeline.one_for_all.pictures import Squares
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.one_for_all.training import TrainingImages, UniversalFit
from pipeline.surrogates.surrogate import Surrogate

MEASURED_IMAGES = 2  # batch normalisation needs two; at full size each takes seconds on a CPU
_STATES = 4  # float32 for each parameter: itself, its gradient, and two moments of Adam


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training takes.

    steps        optimiser steps, each on a batch over all workers
    image_bytes  memory of the images, in each worker and once for all
    model_bytes  memory of the generator and its optimiser in each worker, without activations
    seconds      of all steps in one process on the surrogate's device
    """

    steps: int
    image_bytes: int
    model_bytes: int
    seconds: float


def estimate_training(
    squares: Squares, surrogate: Surrogate, bank: torch.Tensor, settings: OneForAllSettings, images: int
) -> TrainingEstimate:
    """Time a step on the first images.

    squares  a few of the images
    bank     float [m, d], as for UniversalFit
    images   that are trained on
    Raises InputError if fewer than two of the squares are there or fewer images than a batch, and what UniversalFit
    raises.
    """
    if len(squares.pixels) < MEASURED_IMAGES:
        raise InputError("fewer than two of the first images can be read, so that no step can be timed")
    steps = settings.steps_for(images)
    if not steps:
        raise InputError(f"about {images:,} images are fewer than --batch-size {settings.batch_size}")
    few = replace(settings, batch_size=MEASURED_IMAGES, accumulate=1, epochs=2, max_steps=2)
    pixels = torch.from_numpy(squares.pixels[:MEASURED_IMAGES])
    labels = None if squares.labels is None else torch.from_numpy(squares.labels[:MEASURED_IMAGES])
    fit = UniversalFit(TrainingImages(pixels, labels), surrogate, bank, few, str(surrogate.device))
    fit.advance(1)
    started = time.perf_counter()
    fit.advance(1)
    each = (time.perf_counter() - started) / MEASURED_IMAGES
    parameters = sum(parameter.numel() for parameter in fit.generator.parameters())
    return TrainingEstimate(
        steps=steps,
        image_bytes=fit_bytes(images, squares.pixels.shape[-1]),
        model_bytes=4 * _STATES * parameters,
        seconds=steps * settings.batch_size * each,
    )
