"""The network of a proxy; `pipeline.fitting.proxy_training` trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.precision import autocast, dtype_of

WIDTH = 192  # of the features
LARGE_SIDE = 64  # from this size on, the first convolution halves the resolution


class ProxyNetwork(nn.Module):
    """Six layers with batch normalisation, 0.36 M parameters: images in [0, 1] -> features -> cluster logits.

    images [B, 3, S, S] float -> features float [B, 192] -> logits [B, p]
    """

    def __init__(self, num_clusters: int, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(3, 24, nn.MaxPool2d(2), stride=2 if side >= LARGE_SIDE else 1),
            *_layer(24, 64, nn.MaxPool2d(2)),
            *_layer(64, 96),
            *_layer(96, 96, nn.MaxPool2d(2)),
            *_layer(96, WIDTH),
        )
        self.head = nn.Linear(WIDTH, num_clusters)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features float32 [B, 192], which deltas move."""
        with autocast(images.device):
            maps: Tensor = self.body((images - 0.5) / 0.25)
        return maps.float().mean((2, 3))

    def fuse(self) -> None:
        """Fold each batch normalisation, in inference mode, into the convolution before it."""
        layers: list[nn.Module] = []
        for layer in self.body:
            if isinstance(layer, nn.BatchNorm2d):
                before = layers.pop()
                assert isinstance(before, nn.Conv2d)
                layer = fuse_conv_bn_eval(before, layer)
            layers.append(layer)
        self.body = nn.Sequential(*layers)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits; keep float [B, 192] holds the dropout factors of a training step."""
        features = self.features(images)
        logits: Tensor = self.head(features if keep is None else features * keep)
        return logits


def loaded_proxy(
    weights: Mapping[str, NDArray[Any]], num_clusters: int, side: int, device: torch.device | str
) -> ProxyNetwork:
    """A frozen proxy for steps through it, from its state dict."""
    network = ProxyNetwork(num_clusters, side)
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    return frozen_proxy(network, torch.device(device))


def frozen_proxy(network: ProxyNetwork, device: torch.device) -> ProxyNetwork:
    """The network itself, ready for steps through it: in inference mode, fused, and converted once for autocast."""
    network.eval().requires_grad_(False).fuse()
    network.body.to(dtype_of(device))  # else autocast would convert the weights at every step
    return network.to(device).to(memory_format=torch.channels_last)


def _layer(inputs: int, outputs: int, *pool: nn.Module, stride: int = 1) -> tuple[nn.Module, ...]:
    """Pooling comes before the ReLU, which then has a quarter of the values to look at; the maximum is the same."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), *pool, nn.ReLU(inplace=True)


def crop_padding(side: int) -> int:
    """Padding in pixels for random crops of images of `side` pixels: 4 at 32."""
    return side // 8
