"""Features on a GPU against those of the CPU, for every kind of tower."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.surrogates.surrogate import Surrogate, load_surrogate
from tests.support.samples import noise

TOWERS = ["open_clip:ViT-B-32/random-0", "open_clip:RN50/random-0", "torchvision:resnet18/random-0", EMBEDDED_SURROGATE]
SIDE = {"open_clip:ViT-B-32/random-0": None, "open_clip:RN50/random-0": None}
FLOAT32_ERROR = 5e-3  # of the largest feature; convolutions may use TF32 on a GPU
LEAST_COSINE = 0.99  # of bfloat16 features to float32 ones


@cache  # a tower takes longer to make than to test
def loaded(name: str, device: str) -> Surrogate:
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    return load_surrogate(name, weights=None, size=SIDE.get(name, 96), device=device)


@pytest.mark.parametrize("name", TOWERS)
def test_features_on_the_device_are_those_of_the_cpu(name: str, device: str) -> None:
    pictures = [noise(80 + 31 * number, 120, seed=number) for number in range(3)]
    here, there = loaded(name, "cpu"), loaded(name, device)
    on_cpu, on_device = here.prepare(pictures), there.prepare(pictures).cpu()
    # resizing rounds to 8 bits after each axis on both, the CPU with whole numbers
    assert (on_cpu - on_device).abs().max() <= 2 / 255 + 1e-6
    with torch.inference_mode():
        exact = here.embed(on_cpu).numpy()
        single = there.embed(on_cpu.to(there.device)).cpu().numpy()
    assert np.abs(single - exact).max() <= FLOAT32_ERROR * np.abs(exact).max()
    half = there.embed_pictures(pictures)
    cosine = (half * exact).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() >= LEAST_COSINE


@pytest.mark.parametrize("name", TOWERS)
def test_the_same_pictures_have_the_same_features_to_the_bit(name: str, device: str) -> None:
    pictures = [noise(100, 90, seed=number) for number in range(4)]
    surrogate = loaded(name, device)
    assert np.array_equal(surrogate.embed_pictures(pictures), surrogate.embed_pictures(pictures))
