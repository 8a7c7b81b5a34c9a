"""Views are what numpy and Pillow say they are, and gradients pass through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import adjust_saturation

from pipeline.hashing import torch_rng
from pipeline.pictures.augment import GREY, Views, colour_jitter, random_views, take


def pictures(count: int = 6, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch_rng(0, "test"))


def test_a_view_is_a_window_of_the_reflected_image_maybe_flipped() -> None:
    images = pictures(40)
    seen = take(images, random_views(40, 8, 8, 3, torch_rng(1, "views"))).numpy()
    flips = 0
    for image, view in zip(images.numpy(), seen, strict=True):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="reflect")
        windows = [padded[:, y : y + 8, x : x + 8] for y in range(7) for x in range(7)]
        straight = any(np.array_equal(view, window) for window in windows)
        flipped = any(np.array_equal(view, window[:, :, ::-1]) for window in windows)
        assert straight or flipped
        flips += flipped and not straight
    assert 8 <= flips <= 32


def test_gradients_take_the_same_way_as_values() -> None:
    views = random_views(6, 8, 6, 2, torch_rng(2, "views"))
    images = pictures().requires_grad_()
    weights = torch.rand(6, 3, 6, 6)
    assert torch.equal(take(images, views), take(images.detach(), views))
    (take(images, views) * weights).sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros(6, 3, 8, 8)
    for b in range(6):
        for i in range(6):
            for j in range(6):
                expected[b, :, views.rows[b, i], views.columns[b, j]] += weights[b, :, i, j]
    assert images.grad is not None
    assert torch.allclose(images.grad, expected)


def test_a_larger_image_is_cropped_and_bytes_stay_bytes() -> None:
    images = (pictures(20, 12) * 255).to(torch.uint8)
    seen = take(images, random_views(20, 12, 8, 0, torch_rng(3, "views")))
    assert seen.shape == (20, 3, 8, 8)
    assert seen.dtype == torch.uint8
    whole = Views(torch.arange(12).expand(20, -1), torch.arange(12).expand(20, -1))
    assert torch.equal(take(images, whole), images)


def test_a_tenth_of_a_pixels_draw_is_named_not_global() -> None:
    torch.manual_seed(5)
    first = colour_jitter(pictures(), torch_rng(4, "colour"))
    torch.manual_seed(6)
    assert torch.equal(first, colour_jitter(pictures(), torch_rng(4, "colour")))
    assert not torch.equal(first, colour_jitter(pictures(), torch_rng(5, "colour")))


def test_colour_changes_stay_in_range_and_half_of_the_images_become_grey() -> None:
    seen = colour_jitter(pictures(2000, 4), torch_rng(6, "colour"))
    assert seen.min() >= 0
    assert seen.max() <= 1
    grey = (seen.amax(1) - seen.amin(1)).amax((1, 2)) < 1e-5
    assert 0.46 < grey.float().mean() < 0.54


def test_grey_images_keep_their_shape_and_change_in_brightness_and_contrast_only() -> None:
    grey = (0.3 + 0.4 * torch.rand(500, 1, 4, 4, generator=torch_rng(7, "test"))).expand(-1, 3, -1, -1)
    seen = colour_jitter(grey, torch_rng(8, "colour"))
    assert (seen.amax(1) - seen.amin(1)).max() < 1e-5
    inside = (seen.amin((1, 2, 3)) > 0) & (seen.amax((1, 2, 3)) < 1)
    before, after = grey[inside, 0].flatten(1), seen[inside, 0].flatten(1)
    mean_ratio = after.mean(1) / before.mean(1)
    assert 0.59 < mean_ratio.min() < 0.7
    assert 1.3 < mean_ratio.max() < 1.41
    contrast = after.std(1) / before.std(1) / mean_ratio
    assert 0.59 < contrast.min() < 0.7
    assert 1.25 < contrast.max() < 1.41


def test_saturation_and_grey_weights_are_those_of_torchvision_and_pillow() -> None:
    image = pictures(1)
    mix = 1.5 * torch.eye(3) + (1 - 1.5) * torch.tensor(GREY).expand(3, 3)
    mine = torch.einsum("cd,bdhw->bchw", mix, image).clamp(0, 1)
    assert torch.allclose(mine, adjust_saturation(image, 1.5), atol=2e-3)
    pixels = (image[0].permute(1, 2, 0) * 255).byte().numpy()
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float)
    assert np.abs(pixels @ np.array(GREY) - grey).max() <= 1


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        random_views(1, 8, 12, 1, torch_rng(0, "views"))
    with pytest.raises(ValueError, match="reflection needs less"):
        random_views(1, 8, 12, 8, torch_rng(0, "views"))
