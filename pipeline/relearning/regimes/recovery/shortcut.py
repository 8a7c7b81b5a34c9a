"""A weak network learns the shortcut first; the target then learns what is left (Clark et al., EMNLP 2019)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.hashing import derive
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.training import Regime

if TYPE_CHECKING:
    from pipeline.relearning.training import Training

_SIDE = 64  # at most this many pixels: coarser than the finest detail of most shortcuts, and cheap
_EPOCHS = 3


class ShortcutNet(Regime):
    """Product of experts: the target's logits are added to the log-probabilities of a frozen weak network.

    The weak network, three small convolutions trained for three epochs, finds what is learnt fastest: the shortcut.
    Where it is confident and right, the product has almost no loss, so the target learns from images whose shortcut is
    missing or wrong. At test time the target is used alone. The product is the "bias product" of Clark, Yatskar &
    Zettlemoyer (EMNLP 2019); using a weak network in place of a known bias follows Sanh et al. (ICLR 2021). The weak
    network is trained with label smoothing, which bounds its confidence; the product is not, since the target would
    then have to undo that confidence.
    """

    name = "shortcut-net"

    def __init__(self) -> None:
        self._weak: Training | None = None

    def start(self, training: Training) -> None:
        from pipeline.relearning.training import Training  # that module imports regimes

        head = training.network.head
        assert isinstance(head, nn.Linear), "a target's head is one linear layer"
        with named_randomness(training, self.name):
            network = _weak_network(head.out_features)
            recipe = replace(training.recipe, epochs=_EPOCHS, dropout=0.0)
            seed = derive(training.seed, self.name)
            weak = Training(network, training.images, training.labels, Regime(), recipe, seed, training.device)
            for epoch in range(_EPOCHS):
                weak.run_epoch(epoch)
        weak.network.eval()
        self._weak = weak

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        assert self._weak is not None, "start was not called"
        with torch.no_grad():
            bias = self._weak.scores(images).log_softmax(1)
        scores = training.scores(images)
        return F.cross_entropy(scores + bias, labels), scores

    def state(self) -> dict[str, Tensor]:
        return {} if self._weak is None else dict(self._weak.network.state_dict())

    def load(self, state: dict[str, Tensor]) -> None:
        assert self._weak is not None, "start was not called"
        self._weak.network.load_state_dict(state)


class _Shrink(nn.Module):
    """Average-pool to at most 64 px a side."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, min(_SIDE, images.shape[-1]))


def _weak_network(num_classes: int) -> nn.Sequential:
    """conv 3->16 /2, 16->32 /2, 32->32, each with BN and ReLU, global max-pool, linear: 15,000 parameters."""
    layers: list[nn.Module] = [_Shrink()]
    for channels_in, channels_out, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 1)):
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
