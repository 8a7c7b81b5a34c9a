"""The universal generator: from an image and its embedding to the values before tanh.

Chen et al. 2024, section 4.1, say only that it is "deeper" than that of Unlearnable Clusters and concatenates the
embedding; the layers follow their released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.deltas.generators import ResidualBlock, bounded, double, first_layers, halve, last_layers
from pipeline.deltas.universal.shape import BLOCKS, WIDTH, Bound
from pipeline.hashing import derive

L2_RADIUS = 16.0  # from the released code, for 3 x 224 x 224 images in [0, 1]


class UniversalGenerator(nn.Module):
    """Three stages down, fusion with the embedding, residual blocks, three stages up.

    With width 64, 24 blocks and embeddings of 512 values it has 121,133,699 parameters. Batch normalisation uses batch
    statistics in training and running statistics afterwards.

    forward: images float [B, 3, S, S] in [0, 1], S a multiple of 8 and at least 16, and embeddings float [B, d],
    repeated over the coarsest grid -> the values before tanh, float [B, 3, S, S].
    """

    def __init__(self, dimension: int, *, width: int = WIDTH, blocks: int = BLOCKS, seed: int = 0) -> None:
        super().__init__()
        self.dimension, self.width, self.num_blocks = dimension, width, blocks
        deep = 8 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "universal-generator"))
            norm = nn.BatchNorm2d
            stages = [layer for stage in range(3) for layer in halve(width << stage, norm)]
            self.down = nn.Sequential(*first_layers(width, norm), *stages)
            self.fusion = nn.Sequential(
                nn.Conv2d(deep + dimension, deep, 3, padding=1), norm(deep), nn.ReLU(inplace=True)
            )
            self.blocks = nn.Sequential(*(ResidualBlock(deep, norm) for _ in range(blocks)))
            stages = [layer for stage in (3, 2, 1) for layer in double(width << stage, norm)]
            self.up = nn.Sequential(*stages, *last_layers(width))

    def forward(self, images: Tensor, embeddings: Tensor) -> Tensor:
        maps = self.down(images)
        grid = embeddings.to(maps.dtype)[:, :, None, None].expand(-1, -1, *maps.shape[2:])
        raw: Tensor = self.up(self.blocks(self.fusion(torch.cat([maps, grid], 1))))
        return raw


def bounded_output(raw: Tensor, epsilon: float, bound: Bound) -> Tensor:
    """Raw generator output -> delta in pixel units, float [B, 3, S, S].

    eps_tanh    epsilon * tanh: within epsilon, gradient everywhere (ours; the paper says only |delta| < 8/255)
    tanh_clamp  tanh clipped at epsilon, as in Unlearnable Clusters: no gradient where it is clipped
    l2          tanh scaled to the L2 norm 16 * S / 224 per image, as the released code does at 224; not bounded
                by epsilon per pixel, so it is clipped at epsilon when it is added to a picture
    """
    if bound != "l2":
        return bounded(raw, epsilon, bound)
    values = raw.tanh()
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1).clamp_min(1e-12)[:, None, None, None]
    scaled: Tensor = values * (L2_RADIUS * raw.shape[-1] / 224) / norm
    return scaled
