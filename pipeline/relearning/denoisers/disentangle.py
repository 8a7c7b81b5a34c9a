"""D-VAE: a variational autoencoder whose rate is limited keeps the picture and drops the delta.

Yu et al., Purify Unlearnable Examples via Rate-Constrained Variational Autoencoders (ICML 2024). It needs nothing but
the protected images and their labels. A second decoder predicts each delta from the image and a vector for its label.
Layers, losses and constants are those of the authors' code, with half their width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PromiseError
from pipeline.fitting.fit_figures import reproducible
from pipeline.hashing import derive, torch_rng
from pipeline.precision import autocast
from pipeline.schedules import cosine

WIDTH = 32  # the authors': 64
BATCH = 128
LEAST_BATCH = 32  # for small collections, which use an eighth of their images
PEAK_LR = 0.005
EPOCHS = 60  # of each of the two stages
SMALLEST_DELTA = 0.002  # mean squared delta that costs nothing; counted once a sixth of the steps is over
GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class Stage:
    """Rate in nats per place of the latent map up to which it costs nothing, and the weight of what is above."""

    rate: float
    weight: float


FIRST, SECOND = Stage(1.0, 0.01), Stage(2.5, 0.01)  # the weight of .5 in the code is that of targets below 1


class DisentanglingVAE(nn.Module):
    """Images -> the picture in them, their delta, and the rate.

    forward: images float [B, 3, S, S] in [0, 1], S even, labels int64 [B]
             -> picture float32 [B, 3, S, S] in [0, 1], delta float32 [B, 3, S, S] (pixel units), rate float32 []
    noise    float [B, 4 * width, S / 2, S / 2], standard normal, for the latent map; None: its mean
    """

    def __init__(self, num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.latent = 4 * width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width, width),
            Residual(width, width),
            Residual(width, 2 * width, stride=2),
        )
        self.mean = nn.Conv2d(2 * width, self.latent, 1)
        self.log_variance = nn.Conv2d(2 * width, self.latent, 1)
        self.widen = nn.Conv2d(self.latent, 2 * width, 1)
        self.picture = _decoder(width)
        self.delta = _decoder(width)
        self.of_label = nn.Embedding(num_classes, 2 * width)

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.stem(images)
        mean, log_variance = self.mean(maps).float(), self.log_variance(maps).float()
        drawn = mean if noise is None else mean + noise * (0.5 * log_variance).exp()
        picture = self.picture(self.widen(drawn)).float().sigmoid()
        delta = self.delta(maps + self.of_label(labels)[:, :, None, None]).float()
        return picture, delta, rate(mean, log_variance)


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.beside: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.beside = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.body(maps) + self.beside(maps))


def _decoder(width: int) -> nn.Sequential:
    """Maps [B, 2 * width, S / 2, S / 2] -> [B, 3, S, S]; at stride 1 a transposed convolution is a plain one."""
    return nn.Sequential(
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.Conv2d(width, width, 3, padding=1),
        nn.InstanceNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width // 2, 3, padding=1),
        nn.InstanceNorm2d(width // 2),
        nn.ReLU(),
        nn.Conv2d(width // 2, 3, 3, padding=1),
    )


def rate(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of the latent map from the standard normal in nats: summed over channels, averaged over the rest."""
    return (-0.5 * (1 + log_variance - mean.square() - log_variance.exp())).sum(1).mean()


def loss_of(picture: Tensor, delta: Tensor, nats: Tensor, images: Tensor, stage: Stage, *, late: bool) -> Tensor:
    """Squared error of the picture, and of picture and delta together, and what the rate has above its target.

    late  the size of the delta counts, too
    """
    loss = F.mse_loss(picture, images) + F.mse_loss((picture + delta).clamp(0, 1), images)
    loss = loss + stage.weight * nats.clamp_min(stage.rate)
    return loss + delta.square().mean().clamp_min(SMALLEST_DELTA) if late else loss


def purified(images: Tensor, labels: Tensor, *, seed: int, device: torch.device) -> Tensor:
    """Images without what a limited rate drops, uint8 like the images [n, 3, S, S]; labels int64 [n].

    First the predicted deltas are subtracted; then a second autoencoder, trained on what is left, subtracts what it
    predicts, too, and keeps the picture in the rest.
    Deterministic for a given machine and number of threads. Raises PromiseError if a loss is not finite.
    """
    side = images.shape[-1]
    even = F.pad(images.float(), (0, side % 2, 0, side % 2), mode="replicate").to(torch.uint8)
    with reproducible():
        first = _trained(even, labels, FIRST, seed=derive(seed, "d-vae", 1), device=device)
        lighter = _applied(first, even, labels, device, keep_picture=False)
        second = _trained(lighter, labels, SECOND, seed=derive(seed, "d-vae", 2), device=device)
        lightest = _applied(second, lighter, labels, device, keep_picture=False)
        return _applied(second, lightest, labels, device, keep_picture=True)[:, :, :side, :side].contiguous()


def _trained(images: Tensor, labels: Tensor, stage: Stage, *, seed: int, device: torch.device) -> DisentanglingVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        network = DisentanglingVAE(int(labels.max()) + 1)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=PEAK_LR)
    batch = min(BATCH, max(LEAST_BATCH, len(images) // 8), len(images))
    per_epoch = len(images) // batch
    steps = EPOCHS * per_epoch
    half = images.shape[-1] // 2
    for step in range(steps):
        epoch, number = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch_rng(seed, "order", epoch))
        rows = order[number * batch :][:batch]
        seen = images[rows].to(device).float() / 255
        rng = torch_rng(seed, "latent", step)
        noise = torch.randn(len(rows), network.latent, half, half, generator=rng).to(device)
        with autocast(device):
            picture, delta, nats = network(seen, labels[rows].to(device), noise)
        loss = loss_of(picture, delta, nats, seen, stage, late=6 * step >= steps)
        if not bool(torch.isfinite(loss.detach())):
            raise PromiseError(f"training the autoencoder of d-vae, step {step}: the loss is not finite")
        optimiser.param_groups[0]["lr"] = PEAK_LR * cosine(step, steps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
        optimiser.step()
    return network.eval()


@torch.no_grad()
def _applied(
    network: DisentanglingVAE, images: Tensor, labels: Tensor, device: torch.device, *, keep_picture: bool
) -> Tensor:
    """The picture in every image, or the image without its delta, uint8."""
    made = torch.empty_like(images)
    for at in range(0, len(images), BATCH):
        seen = images[at : at + BATCH].to(device).float() / 255
        with autocast(device):
            picture, delta, _ = network(seen, labels[at : at + BATCH].to(device))
        kept = picture if keep_picture else seen - delta
        made[at : at + BATCH] = (kept.clamp(0, 1) * 255).round().to(torch.uint8).to(made.device)
    return made
