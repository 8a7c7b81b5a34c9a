"""Training on what a variational autoencoder of limited rate keeps of the protected images (D-VAE)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.relearning.denoisers.disentangle import purified
from pipeline.relearning.regimes.base import Knowledge
from pipeline.relearning.training import Regime


class Disentangled(Regime):
    """Training images are purified by a D-VAE trained on them alone; test images are not (Yu et al., ICML 2024)."""

    name = "d-vae"

    def __init__(self, known: Knowledge) -> None:
        self._device = torch.device(known.device)

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        return purified(images, labels, seed=seed, device=self._device)
