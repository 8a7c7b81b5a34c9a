"""The common form of targets: a trunk that embeds images, and a classifier on its features."""

from __future__ import annotations

from torch import Tensor, nn


class Target(nn.Module):
    """A network cut in two: forward is head(dropout(embed(images))).

    trunk              float [B, 3, H, W] -> features [B, d]
    head               the final classifier, [B, d] -> scores [B, num_classes]
    dropout            rate between the two
    normalises_itself  True: the trunk takes images in [0, 1] and normalises them as its weights expect;
                       False: the trainer normalises them
    """

    normalises_itself = False

    def __init__(self, trunk: nn.Module, head: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, [B, num_classes]."""
        return self.head(self.dropout(self.embed(images)))  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features, [B, d]."""
        return self.trunk(images)  # type: ignore[no-any-return]
