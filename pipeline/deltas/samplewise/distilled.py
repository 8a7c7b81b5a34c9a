"""Distilled deltas: a network that sees an image and its target makes the delta in one pass.

It is trained once, on the images of the fit, through the same proxies and views as the steps of `sample_steps`: what
the steps find for one image, it has to know for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.deltas.artefact import check_network
from pipeline.deltas.delta import quantise
from pipeline.deltas.samplewise.base import DeltaMaker, check_header
from pipeline.deltas.samplewise.local_bound import local_bound
from pipeline.deltas.samplewise.proxy_network import LARGE_SIDE
from pipeline.hashing import torch_rng
from pipeline.precision import autocast

WIDTH = 32
TARGET_WIDTH = 32  # of the vector that stands for a target cluster
_GROUPS = 8
_NAME = "distilled."


class DistilledNetwork(nn.Module):
    """A U-Net with two halvings, told its target at every layer (FiLM, Perez et al., AAAI 2018); 0.41 M parameters.

    From LARGE_SIDE on, like the proxies, it works at half the resolution, on blocks of 2 x 2 pixels.
    forward: images float [B, 3, S, S] in [0, 1], noise float [B, 1, S, S], targets int64 [B]
             -> float32 [B, 1, S, S] (three channels if `plain`) in -1 ... 1, to be multiplied by the bound
    """

    def __init__(self, num_clusters: int, side: int, *, plain: bool) -> None:
        super().__init__()
        width, self.block = WIDTH, 2 if side >= LARGE_SIDE else 1
        self.target = nn.Embedding(num_clusters, TARGET_WIDTH)
        self.fine = _Layer(4 * self.block**2, width)
        self.halved = _Layer(width, 2 * width, stride=2)
        self.quartered = _Layer(2 * width, 4 * width, stride=2)
        self.deepest = _Layer(4 * width, 4 * width)
        self.to_half = _Layer(6 * width, 2 * width)
        self.to_fine = _Layer(3 * width, width)
        self.last = nn.Conv2d(width, (3 if plain else 1) * self.block**2, 3, padding=1)

    def forward(self, images: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
        target = self.target(targets)
        with autocast(images.device):
            seen = F.pixel_unshuffle(torch.cat([(images - 0.5) / 0.25, noise], 1), self.block)
            fine = self.fine(seen, target)
            half = self.halved(fine, target)
            deepest = self.deepest(self.quartered(half, target), target)
            half = self.to_half(_joined(deepest, half), target)
            maps: Tensor = self.last(self.to_fine(_joined(half, fine), target))
        return F.pixel_shuffle(maps.float(), self.block).tanh()


class _Layer(nn.Module):
    """Convolution, normalisation, scale and offset by the target, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(_GROUPS, outputs)
        self.film = nn.Linear(TARGET_WIDTH, 2 * outputs)

    def forward(self, maps: Tensor, target: Tensor) -> Tensor:
        scale, offset = self.film(target)[:, :, None, None].chunk(2, 1)
        # In channels-last order, which is faster for the rest, GroupNorm's sums depend on the number of threads
        normed = self.norm(self.convolution(maps).contiguous()).contiguous(memory_format=torch.channels_last)
        return F.relu(normed * (1 + scale) + offset)


def _joined(coarse: Tensor, fine: Tensor) -> Tensor:
    return torch.cat([F.interpolate(coarse, size=fine.shape[2:]), fine], 1)


@dataclass(frozen=True, eq=False)
class DistilledGenerator:
    """Everything that makes the delta of an image: the network, and what is drawn for each image.

    side        of a delta, and of the square that an image is squeezed to, pixels
    plain       deltas with three channels instead of one
    seed        of the noise, which also depends on the sample's key
    weights     of DistilledNetwork, by name
    flat_share  of epsilon, where an image is flat; see local_bound
    """

    side: int
    plain: bool
    seed: int
    weights: Mapping[str, NDArray[Any]]
    flat_share: float = 1.0

    def header(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {name: getattr(self, name) for name in ("side", "plain", "seed", "flat_share")}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights, named as from_parts expects."""
        return {f"{_NAME}{name}": array for name, array in self.weights.items()}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> DistilledGenerator:
        """The inverse of header and tensors. Raises KeyError, ValueError or TypeError for anything else."""
        weights = {name.removeprefix(_NAME): array for name, array in tensors.items() if name.startswith(_NAME)}
        if "target.weight" not in weights:
            raise ValueError("no network")
        made = cls(**header, weights=weights)
        check_header(made.header())
        check_network(weights, lambda: DistilledNetwork(made.num_clusters, made.side, plain=made.plain))
        return made

    @property
    def num_clusters(self) -> int:
        """How many clusters it knows targets for."""
        return len(self.weights["target.weight"])


class DistilledPass(DeltaMaker):
    """Runs a DistilledGenerator on one device; see DeltaMaker."""

    def __init__(
        self, generator: DistilledGenerator, targets: Sequence[int], epsilon: float, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(targets, epsilon, device)
        self._generator = generator
        network = DistilledNetwork(len(targets), generator.side, plain=generator.plain)
        network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in generator.weights.items()})
        network = network.to(device).to(memory_format=torch.channels_last)
        self._network = network.eval().requires_grad_(False)

    def _batch(self, images: Tensor, aims: Tensor, keys: Sequence[str]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        generator = self._generator
        noise = torch.stack([noise_for(generator.side, torch_rng(generator.seed, "distilled", key)) for key in keys])
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            delta = self._network(images, noise.to(self._device), aims)
            delta = delta * local_bound(images, self._epsilon, generator.flat_share)
        levels = quantise(delta.expand(-1, 3, -1, -1).contiguous(), self._epsilon)
        return levels, np.empty((len(images), 0), np.float32)


def noise_for(side: int, rng: torch.Generator) -> Tensor:
    """What tells an image from others of its cluster that look alike: float [1, S, S] in -1 ... 1."""
    return 2 * torch.rand(1, side, side, generator=rng) - 1
