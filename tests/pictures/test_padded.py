"""Padded pixels are the pixels that Pillow shows, without a copy, and nothing else is taken for padded."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.deltas.delta import Steps, add_steps
from pipeline.errors import PromiseError
from pipeline.pictures.padded import image_of, padded, pixels_of, whole_of
from tests.support.samples import noise


def whole(pixels: np.ndarray) -> np.ndarray:
    found = whole_of(padded(pixels))
    assert found is not None
    return found


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (160, 160), (375, 500)])
def test_pixels_are_those_that_pillow_copies_out(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    pixels = pixels_of(image)
    assert pixels.shape == (*size, 3)
    assert (pixels == np.asarray(image)).all()
    whole = whole_of(pixels)
    assert whole is not None
    assert (whole[:, :, :3] == pixels).all()


def test_pixels_outlive_their_image_and_the_image_its_pixels() -> None:
    expected = noise(200, 300)
    pixels = pixels_of(Image.fromarray(expected))
    gc.collect()
    image = image_of(pixels)
    assert (pixels == expected).all()
    del pixels
    gc.collect()
    assert (np.asarray(image) == expected).all()


def test_an_image_in_several_blocks_is_copied() -> None:
    image = Image.fromarray(noise(1, 1)).resize((3000, 2000))
    image.paste((1, 2, 3), (2999, 1999, 3000, 2000))
    pixels = pixels_of(image)
    assert whole_of(pixels) is None
    assert pixels[-1, -1].tolist() == [1, 2, 3]
    again = padded(pixels)
    assert whole_of(again) is not None
    assert (again == pixels).all()


def test_views_that_only_look_padded_are_not() -> None:
    whole = noise(6, 8, 4)
    assert whole_of(whole[:, :, :3]) is not None
    for other in (whole[:, :, 1:], whole[:3, :, :3], whole[:, :4, :3], whole[::-1, :, :3], noise(6, 8)):
        assert whole_of(other) is None
        assert (np.asarray(image_of(np.ascontiguousarray(other))) == other).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True, "exact": True})],
)
def test_files_of_padded_and_packed_pixels_are_equal(kind: str, options: dict[str, object]) -> None:
    pixels = noise(57, 91)
    files = []
    for image in (Image.fromarray(pixels), image_of(padded(pixels), rgbx=kind == "JPEG")):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    assert files[0] == files[1]


@pytest.mark.parametrize("bound", [1, 16, 127])
def test_steps_give_the_clipped_sum_for_every_pixel_value_and_level(bound: int) -> None:
    values, levels = np.arange(256), np.arange(-bound, bound + 1)
    pixels = np.broadcast_to(values[:, None, None], (256, len(levels), 3)).astype(np.uint8)
    laid = np.broadcast_to(levels[None, :, None], pixels.shape).astype(np.int16)
    after, largest = add_steps(whole(pixels), Steps(laid), bound / 255)
    assert (after == np.clip(values[:, None, None] + levels[None, :, None], 0, 255)).all()
    assert largest == bound


def test_steps_keep_the_padding_and_the_bound() -> None:
    laid = np.zeros((4, 5, 3), np.int16)
    after, largest = add_steps(noise(4, 5, 4), Steps(laid), 16 / 255)
    assert largest == 0
    assert (after.base == noise(4, 5, 4)).all()
    laid[2, 3, 1] = -17
    with pytest.raises(PromiseError, match=r"pixel \(row 2, column 3, channel 1\) would change by 17 levels"):
        add_steps(np.full((4, 5, 4), 100, np.uint8), Steps(laid), 16 / 255)


def test_steps_meet_padded_pixels_of_their_own_size_only() -> None:
    steps = Steps(np.zeros((4, 5, 3), np.int16))
    with pytest.raises(PromiseError, match="does not fit"):
        add_steps(noise(5, 4, 4), steps, 16 / 255)
    with pytest.raises(PromiseError, match="does not fit"):
        add_steps(noise(4, 5), steps, 16 / 255)
    with pytest.raises(PromiseError, match="more than 127"):
        Steps(np.full((4, 5, 3), 128, np.int16))
