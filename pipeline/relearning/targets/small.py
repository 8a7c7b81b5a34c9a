"""A small, fast ResNet that a CPU can train in seconds."""

from __future__ import annotations

from torch import Tensor, nn


class SmallResNet(nn.Module):
    """A residual network small enough for a CPU: 0.38 M parameters, images of 32 px or more.

    conv-BN-ReLU 3->16, 16->48 /2, 48->96 /2, max-pool, one residual block of two 96->96, 96->192, global max-pool,
    linear: the layout of CIFAR-10 speed-record networks. From 64 px up the first layer has stride 2.
    Input float [B, 3, H, W], normalised; output float [B, num_classes].
    """

    def __init__(self, num_classes: int, side: int, dropout: float = 0.0) -> None:
        super().__init__()
        first_stride = 2 if side >= 64 else 1
        self.stem = nn.Sequential(_block(3, 16, first_stride), _block(16, 48, 2), _block(48, 96, 2), nn.MaxPool2d(2))
        self.residual = nn.Sequential(_block(96, 96, 1), _block(96, 96, 1))
        self.last = _block(96, 192, 1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.dropout(self.embed(images)))  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features, float [B, 192]."""
        hidden = self.stem(images)
        hidden = self.last(hidden + self.residual(hidden))
        return hidden.amax(dim=(2, 3))  # type: ignore[no-any-return]


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )
