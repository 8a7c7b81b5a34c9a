"""What a surrogate is given: pictures of any shape, resized as everywhere, and files of weights that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.settings import EMBEDDED_SURROGATE
from pipeline.surrogates.surrogate import Surrogate, load_surrogate, resized_by_axis
from tests.support.samples import noise


@pytest.fixture(scope="module")
def embedded() -> Surrogate:
    return load_surrogate(EMBEDDED_SURROGATE, weights=None, size=None, device="cpu")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(224, 300), (160, 183), (40, 60)])
def test_where_there_is_no_8_bit_kernel_pictures_are_resized_to_nearly_the_same(
    mode: str, size: tuple[int, int]
) -> None:
    pixels = torch.from_numpy(noise(111, 120)).permute(2, 0, 1)[None]
    expected = functional.interpolate(pixels, size, mode=mode, antialias=True)
    found = resized_by_axis(pixels, size, mode)
    assert (found.int() - expected.int()).abs().max() <= 2
    assert (found.int() - expected.int()).abs().float().mean() < 0.3


@pytest.mark.parametrize("is_wide", [False, True])
def test_of_a_strip_the_middle_is_seen_without_enlarging_all_of_it(
    embedded: Surrogate, monkeypatch: pytest.MonkeyPatch, is_wide: bool
) -> None:
    strip = np.zeros((60_001, 1, 3), np.uint8)
    strip[:, 0, 0] = np.abs(np.arange(60_001) - 30_000).clip(0, 255)  # black in the middle
    strip[29_999:30_002] = 0
    sizes = []
    interpolate = functional.interpolate

    def seen(pixels: Tensor, size: tuple[int, int], **options: object) -> Tensor:
        sizes.append(size)
        return interpolate(pixels, size, **options)

    monkeypatch.setattr(functional, "interpolate", seen)
    prepared = embedded.prepare([strip.transpose(1, 0, 2) if is_wide else strip])
    assert prepared.max() <= 3 / 255  # one source pixel is 256 wide
    ((height, width),) = sizes
    assert height * width <= 16 * 256 * 256


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "the file is empty or ends early"), ([1], "it holds a list"), (torch.ones(2), "it holds a Tensor")],
)
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18/IMAGENET1K_V1", "open_clip:RN50/openai"])
def test_a_file_without_weights_is_one_line(tmp_path: Path, name: str, content: object, why: str) -> None:
    file = tmp_path / "weights.pt"
    if content is None:
        file.touch()
    else:
        torch.save(content, file)
    why = "" if name.startswith("open_clip") else why  # which reads the file itself, and says it in its own words
    with pytest.raises(InputError, match=rf"^[^\n]*weights\.pt does not hold the weights of {name}[^\n]*{why}[^\n]*$"):
        load_surrogate(name, weights=file, size=None, device="cpu")
