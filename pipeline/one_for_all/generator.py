"""The universal generator: an image and its embedding in, the values before tanh out.

Chen et al. 2024, section 4.1, say only "deeper" than that of Unlearnable Clusters, with the embedding concatenated;
the layers are those of their released code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.fingerprint import derive

Bound = Literal["eps_tanh", "tanh_clamp", "l2"]
BOUNDS: tuple[Bound, ...] = ("eps_tanh", "tanh_clamp", "l2")
WIDTH, BLOCKS = 64, 24
L2_RADIUS = 16.0  # of the released code, for 3 x 224 x 224 images in [0, 1]
STRIDE = 8  # sides must be multiples of it


class UniversalGenerator(nn.Module):
    """Three stages down, fusion with the embedding, residual blocks, three stages up.

    With width 64, 24 blocks and embeddings of 512 it has 121,133,699 parameters. Batch normalisation uses the
    statistics of the batch while it is trained and running ones afterwards.

    forward: images float [B, 3, S, S] in [0, 1], S a multiple of 8 and at least 16, and embeddings float [B, d], each
    of which is repeated over the coarsest grid -> the values before tanh, float [B, 3, S, S].
    """

    def __init__(self, dimension: int, *, width: int = WIDTH, blocks: int = BLOCKS, seed: int = 0) -> None:
        super().__init__()
        self.dimension, self.width, self.num_blocks = dimension, width, blocks
        deep = 8 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "universal-generator"))
            self.down = nn.Sequential(
                nn.ReflectionPad2d(3),
                nn.Conv2d(3, width, 7, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                *(layer for i in range(3) for layer in _halve(width << i)),
            )
            self.fusion = nn.Sequential(
                nn.Conv2d(deep + dimension, deep, 3, padding=1), nn.BatchNorm2d(deep), nn.ReLU(inplace=True)
            )
            self.blocks = nn.Sequential(*(_Residual(deep) for _ in range(blocks)))
            self.up = nn.Sequential(
                *(layer for i in (3, 2, 1) for layer in _double(width << i)),
                nn.ReflectionPad2d(3),
                nn.Conv2d(width, 3, 7),
            )

    def forward(self, images: Tensor, embeddings: Tensor) -> Tensor:
        maps = self.down(images)
        grid = embeddings.to(maps.dtype)[:, :, None, None].expand(-1, -1, *maps.shape[2:])
        raw: Tensor = self.up(self.blocks(self.fusion(torch.cat([maps, grid], 1))))
        return raw


def bounded(raw: Tensor, bound: Bound, epsilon: float) -> Tensor:
    """What the generator gave -> delta in pixel units, float [B, 3, S, S].

    eps_tanh    epsilon * tanh: within epsilon, a gradient everywhere (ours; the paper says only |delta| < 8/255)
    tanh_clamp  tanh, cut off at epsilon, as in Unlearnable Clusters: no gradient where it is cut
    l2          tanh scaled to the L2 norm 16 * S / 224 per image, as the released code does at 224; not within any
                epsilon per pixel, so it is cut off at epsilon when it is laid
    """
    if bound == "eps_tanh":
        return epsilon * raw.tanh()
    if bound == "tanh_clamp":
        return raw.tanh().clamp(-epsilon, epsilon)
    values = raw.tanh()
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1).clamp_min(1e-12)[:, None, None, None]
    scaled: Tensor = values * (L2_RADIUS * raw.shape[-1] / 224) / norm
    return scaled


def _halve(channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(inplace=True),
    ]


def _double(channels: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(channels, channels // 2, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(inplace=True),
    ]


class _Residual(nn.Module):
    """Two reflect-padded 3 x 3 convolutions with batch normalisation; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = maps + self.body(maps)
        return total
