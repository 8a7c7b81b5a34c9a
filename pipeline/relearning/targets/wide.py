"""Wide residual networks in the form for small images, which neither torchvision nor timm provides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.relearning.targets.base import Target
from pipeline.relearning.targets.published import SMALL_SIDE


def build_wide(depth: int, width: int, num_classes: int, side: int, dropout: float) -> Target:
    """WRN-depth-width (Zagoruyko and Komodakis 2016, table 1) with random weights; depth is 6 n + 4.

    3x3 stem, three groups of n pre-activation blocks with 16, 32, 64 times `width` channels, global average pooling.
    Above 64 px, a 7x7 stem with pooling first reduces images to a quarter of their side, as in ResNets for ImageNet.
    """
    num_blocks, rest = divmod(depth - 4, 6)
    if rest or num_blocks < 1:
        raise ValueError(f"depth {depth} is not 6 n + 4")
    channels = [16, 16 * width, 32 * width, 64 * width]
    stem: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    if side > SMALL_SIDE:
        stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    groups = [_group(channels[i], channels[i + 1], num_blocks, stride=1 if i == 0 else 2) for i in range(3)]
    end = [nn.BatchNorm2d(channels[3]), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    trunk = nn.Sequential(nn.Sequential(*stem), *groups, nn.Sequential(*end))
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return Target(trunk, nn.Linear(channels[3], num_classes), dropout)


def _group(channels_in: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    blocks = [PreActivationBlock(channels_in, channels, stride)]
    blocks += [PreActivationBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, plus the input (He et al. 2016b, figure 1b), through a 1x1 conv if the shape changes.

    float [B, channels_in, H, W] -> [B, channels, H / stride, W / stride]
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, images: Tensor) -> Tensor:
        """The block's output."""
        hidden = torch.relu(self.norm1(images))
        kept: Tensor = images if self.shortcut is None else self.shortcut(hidden)
        residual: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(hidden))))
        return residual + kept
