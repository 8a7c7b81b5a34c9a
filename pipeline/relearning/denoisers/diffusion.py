"""Noise drowns the deltas, and a diffusion model of other clean pictures takes noise and deltas away.

AVATAR: Dolatabadi et al., The Devil's Advocate: Shattering the Illusion of Unexploitable Data using Diffusion Models
(2023). LE: Jiang et al., Unlearnable Examples Give a False Sense of Security (ACM MM 2023), after the authors' code but
for its guidance towards the protected image: that by pixels moves a ten-thousandth of the difference a step, and that
by perception takes the weights of LPIPS.

The network is the small U-Net of the other denoisers, trained on the pictures at hand. Noise is added to pixels and its
size told to the network (Karras et al., NeurIPS 2022); as in DDPM, each step back draws new noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import take
from pipeline.precision import autocast
from pipeline.relearning.denoisers.denoiser import (
    BLOCK,
    MULTIPLE,
    Denoiser,
    DenoiserRecipe,
    TrainingPictures,
    UNet,
    quantised,
    trained_on,
)

LARGEST, SMALLEST = 0.17, 0.01  # standard deviation of the noise that the network is trained on, pixel units


@dataclass(frozen=True)
class NoiseSchedule:
    """How often noise of this size (standard deviation, pixel units) is added, and the steps that take it away."""

    size: float
    steps: int
    rounds: int = 1


AVATAR_SCHEDULE = NoiseSchedule(LARGEST, 50)  # DDPM's noise after 100 of its 1,000 steps; the authors take 100 back
LE_SCHEDULE = NoiseSchedule(0.038, 20, rounds=4)  # after 20 steps


class NoisedPictures(TrainingPictures):
    """Pictures with Gaussian noise of every size from SMALLEST to LARGEST; those held out have the largest."""

    def __init__(self, clean: Tensor, seed: int, recipe: DenoiserRecipe) -> None:
        super().__init__(clean, None, seed, recipe)
        self._held = self.held_clean[:, :, : self.window, : self.window].float() / 255
        self._noise = torch.randn(self._held.shape, generator=torch_rng(seed, "avatar-held-out")) * LARGEST

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, views = self._drawn()
        clean = take(self.clean[rows], views).float() / 255
        drawn = torch.rand(len(rows), generator=self.rng)
        sizes = SMALLEST * (LARGEST / SMALLEST) ** drawn
        noise = torch.randn(clean.shape, generator=self.rng) * sizes[:, None, None, None]
        return clean + noise, clean, size_maps(sizes, clean.shape)

    @torch.no_grad()
    def held_out_gain(self, network: UNet) -> float:
        network.eval()
        device = next(network.parameters()).device
        left = 0.0
        for at in range(0, len(self._held), BLOCK):
            noise = self._noise[at : at + BLOCK]
            found = noise_in(network, (self._held[at : at + BLOCK] + noise).to(device), LARGEST)
            left += float((found.cpu() - noise).double().square().sum())
        return 10 * math.log10(float(self._noise.double().square().sum()) / left)


def train_diffusion(
    clean: Tensor,
    *,
    seed: int,
    device: str = "cpu",
    recipe: DenoiserRecipe = DenoiserRecipe(),  # noqa: B008  frozen
    digest: str = "",
) -> Denoiser:
    """Train on clean pictures, uint8 [n, 3, S, S]; arguments and errors as for train_denoiser.

    Its gain is that of a single step from the largest noise, on pictures it has not seen.
    """
    if len(clean) < 2:
        raise InputError(f"training a diffusion model takes at least 2 pictures; there are {len(clean)}")
    return trained_on(NoisedPictures(clean, seed, recipe), seed, device, recipe, digest)


def size_maps(sizes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sizes of noise [B] as what a UNet takes for places, float [B, 2, H, W]: in units of the largest, and its root."""
    relative = sizes / LARGEST
    maps = torch.stack([relative, relative.sqrt()], 1)
    return maps[:, :, None, None].expand(-1, -1, *shape[-2:])


def noise_in(network: UNet, images: Tensor, size: float) -> Tensor:
    """The noise of this size in images, float [B, 3, H, W], sides multiples of 8; pixel units."""
    sizes = torch.full((len(images),), size, device=images.device)
    with autocast(images.device):
        noise: Tensor = network(images.contiguous(memory_format=torch.channels_last), size_maps(sizes, images.shape))
        return noise


@torch.no_grad()
def regenerated(network: UNet, images: Tensor, schedule: NoiseSchedule, *, seed: int) -> Tensor:
    """Images, uint8 [n, 3, H, W], after noise and the steps back; same shape, dtype and device.

    What is drawn depends on the seed, on an image's row and on how many images there are.
    """
    device = next(network.parameters()).device
    height, width = images.shape[2:]
    more = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    made = torch.empty_like(images)
    for at in range(0, len(images), BLOCK):
        rng = torch_rng(seed, "avatar", at)
        x = F.pad(images[at : at + BLOCK].float() / 255, more, mode="replicate").to(device)
        for _ in range(schedule.rounds):
            x = _back(network, x + schedule.size * torch.randn(x.shape, generator=rng).to(device), schedule, rng)
        made[at : at + BLOCK] = quantised(x[:, :, :height, :width]).to(images.device)
    return made


def _back(network: UNet, x: Tensor, schedule: NoiseSchedule, rng: torch.Generator) -> Tensor:
    """From noise of the schedule's size to pictures, float, by ancestral sampling."""
    for size, following in pairwise([*np.geomspace(schedule.size, SMALLEST, schedule.steps).tolist(), 0.0]):
        # part of the way to the next size is taken without noise, the rest by new noise
        fresh = following * math.sqrt(1 - (following / size) ** 2)
        kept = math.sqrt(following**2 - fresh**2)
        x = x + (kept / size - 1) * noise_in(network, x, size)
        x = x + fresh * torch.randn(x.shape, generator=rng).to(x.device)
    return x
