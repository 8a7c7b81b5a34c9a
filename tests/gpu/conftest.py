"""Tests that need a GPU. `tests/bench/gpu/run.sh --rehearse` runs them on the CPU, where they must pass as well."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """The device: "cuda", or what GPU_TESTS_DEVICE says."""
    asked = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here; tests/bench/gpu/run.sh --rehearse runs these tests on the CPU")
    return asked
