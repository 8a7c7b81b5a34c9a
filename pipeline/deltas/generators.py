"""Parametrisations of a delta: the generator network of Unlearnable Clusters, or the delta itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.hashing import derive, torch_rng
from pipeline.settings import Bound

Norm = Callable[[int], nn.Module]  # number of channels -> normalisation


class ResidualBlock(nn.Module):
    """Two reflect-padded 3 x 3 convolutions with normalisation; no activation after the sum."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            norm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            norm(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = maps + self.body(maps)
        return total


def first_layers(width: int, norm: Norm) -> list[nn.Module]:
    """Image [B, 3, S, S] -> maps [B, width, S, S]: reflect-padded 7 x 7 convolution."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7, bias=False), norm(width), nn.ReLU(inplace=True)]


def halve(channels: int, norm: Norm) -> list[nn.Module]:
    """Maps [B, channels, S, S] -> [B, 2 channels, S/2, S/2]."""
    convolution = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
    return [convolution, norm(2 * channels), nn.ReLU(inplace=True)]


def double(channels: int, norm: Norm) -> list[nn.Module]:
    """Maps [B, channels, S, S] -> [B, channels/2, 2 S, 2 S]."""
    half = channels // 2
    convolution = nn.ConvTranspose2d(channels, half, 3, stride=2, padding=1, output_padding=1, bias=False)
    return [convolution, norm(half), nn.ReLU(inplace=True)]


def last_layers(width: int) -> list[nn.Module]:
    """Maps [B, width, S, S] -> the values before tanh, [B, 3, S, S]."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7)]


class ResNetGenerator(nn.Module):
    """The encoder-decoder of Generative Adversarial Perturbations (Poursaeed et al., CVPR 2018).

    Unlearnable Clusters (Zhang et al., CVPR 2023, section 3.3) fits one per cluster. With width 64 and 6 blocks
    it has 7,841,411 parameters. Batch normalisation always uses the statistics of the current input, so that
    the same sigma always gives the same delta.

    forward: sigma [1, 3, S, S], S a multiple of 4 and at least 8 -> the values before tanh, same shape.
    """

    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*first_layers(width, _norm), *halve(width, _norm), *halve(2 * width, _norm))
        self.blocks = nn.Sequential(*(ResidualBlock(4 * width, _norm) for _ in range(blocks)))
        self.decoder = nn.Sequential(*double(4 * width, _norm), *double(2 * width, _norm), *last_layers(width))

    def forward(self, sigma: Tensor) -> Tensor:
        raw: Tensor = self.decoder(self.blocks(self.encoder(sigma)))
        return raw


class NetworkDelta(nn.Module):
    """A generator and its noise input sigma ~ U(0, 1), drawn once: forward() -> delta float32 [3, side, side]."""

    sigma: Tensor

    def __init__(
        self,
        side: int,
        epsilon: float,
        bound: Bound,
        *,
        seed: int,
        cluster: int,
        width: int = 64,
        blocks: int = 6,
    ) -> None:
        super().__init__()
        self.epsilon, self.bound = epsilon, bound
        # torch initialises layers from its global generator: fork it, so that nothing else is affected by the seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "generator", cluster))
            self.generator = ResNetGenerator(width, blocks)
        sigma = torch.rand(1, 3, side, side, generator=torch_rng(seed, "sigma", cluster))
        self.register_buffer("sigma", sigma)

    def forward(self) -> Tensor:
        return bounded(self.generator(self.sigma)[0], self.epsilon, self.bound)


class DirectDelta(nn.Module):
    """The delta itself as parameter, initialised uniformly in ±epsilon/2: forward() -> [count, 3, S, S].

    one_channel  start equal in all channels, which the sign steps of a colour-robust fit preserve
    """

    def __init__(
        self, count: int, side: int, epsilon: float, *, seed: int, index: object = "", one_channel: bool = False
    ) -> None:
        super().__init__()
        rng = torch_rng(seed, "delta-start", index)
        start = torch.rand(count, 1 if one_channel else 3, side, side, generator=rng)
        self.delta = nn.Parameter(((start - 0.5) * epsilon).repeat(1, 3 if one_channel else 1, 1, 1))

    def forward(self) -> Tensor:
        return self.delta


def bounded(raw: Tensor, epsilon: float, bound: Bound) -> Tensor:
    """Raw generator output -> delta with |delta| <= epsilon.

    tanh_clamp  clamp(tanh), as in the paper: no gradient where |tanh| > epsilon, about 9 of 10 pixels at the start
    eps_tanh    epsilon * tanh: no dead zone
    clamp_ste   tanh_clamp in the forward pass, tanh in the backward pass (straight-through)
    """
    squashed = torch.tanh(raw)
    if bound == "eps_tanh":
        return epsilon * squashed
    clamped = squashed.clamp(-epsilon, epsilon)
    if bound == "clamp_ste":
        # (squashed - squashed) is exactly zero, so the value is exactly the clamped one.
        return clamped.detach() + (squashed - squashed.detach())
    if bound == "tanh_clamp":
        return clamped
    raise ValueError(f"a generator network is not bounded by {bound!r}")


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)
