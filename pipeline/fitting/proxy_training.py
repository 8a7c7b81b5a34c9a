"""The proxy: a small network trained from scratch on the clean images to predict their cluster ids.

Deltas optimised through what a new network learns first transfer to networks that others train, better than deltas
optimised through a pretrained encoder, whatever the image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.deltas.samplewise.proxy_network import WIDTH, ProxyNetwork, crop_padding
from pipeline.deltas.sign_step import check_finite
from pipeline.fitting.fit import FitImages, checkpoint, entry, restore
from pipeline.hashing import derive, torch_rng
from pipeline.pictures.augment import colour_jitter, random_views, take
from pipeline.schedules import one_cycle

EPOCHS = 12
BATCH_SIZE = 128
SMALL_BATCH = 32  # least batch for small collections, which use an eighth of their images
PEAK_LR = 0.15
WARM_UP = 0.25  # share of the steps
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
DROPOUT = 0.2
STEP = 1.25  # times the radius, as in Wong et al.


@dataclass(frozen=True)
class Schedule:
    """How long the proxy is trained: `steps` batches of `batch` images, `per_epoch` per epoch."""

    batch: int
    per_epoch: int
    steps: int

    @classmethod
    def of(cls, num_images: int, least_steps: int) -> Schedule:
        batch = min(BATCH_SIZE, max(SMALL_BATCH, num_images // 8), num_images)
        per_epoch = num_images // batch
        return cls(batch, per_epoch, max(EPOCHS, math.ceil(least_steps / per_epoch)) * per_epoch)


class ProxyTraining:
    """Trains a ProxyNetwork step by step; every draw is named by (seed, purpose, epoch or step).

    colour_robust  train under colour jitter, channel shuffling and grey, as a relearning adversary would
    least_steps    steps if EPOCHS passes over the images are fewer
    radius         train on adversarial examples within this distance, pixel units, made by one step from a random start
                   (Wong et al., ICLR 2020); 0 = on the plain images
    """

    def __init__(
        self,
        images: FitImages,
        num_clusters: int,
        *,
        colour_robust: bool,
        seed: int,
        device: torch.device,
        least_steps: int,
        radius: float = 0.0,
    ) -> None:
        self._pixels, self._clusters = images.pixels.to(device), images.clusters.to(device)
        self._colour_robust, self._radius, self._seed, self._device = colour_robust, radius, seed, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "proxy"))
            network = ProxyNetwork(num_clusters, images.side)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self._optimiser = torch.optim.SGD(
            self.network.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        self._schedule = Schedule.of(len(images.pixels), least_steps)
        self.steps = self._schedule.steps
        self.step = 0
        self.losses = torch.zeros(self.steps)

    @property
    def is_done(self) -> bool:
        return self.step == self.steps

    def advance(self) -> None:
        """One SGD step. Raises PromiseError for a non-finite loss."""
        epoch, batch = divmod(self.step, self._schedule.per_epoch)
        order = torch.randperm(len(self._pixels), generator=torch_rng(self._seed, "proxy-order", epoch))
        chosen = order[batch * self._schedule.batch :][: self._schedule.batch].to(self._device)
        rng = torch_rng(self._seed, "proxy-step", self.step)
        images = augmented(self._pixels[chosen].float() / 255, rng)
        if self._colour_robust:
            images = colour_jitter(images, rng)
        keep = (torch.rand(len(images), WIDTH, generator=rng) >= DROPOUT).float() / (1 - DROPOUT)
        keep = keep.to(self._device)
        self.network.train()
        if self._radius:
            images = self._moved(images, self._clusters[chosen], keep, rng)
        logits = self.network(images, keep)
        loss = F.cross_entropy(logits, self._clusters[chosen], label_smoothing=LABEL_SMOOTHING)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        check_finite(loss, "training the proxy", self.step)
        self._optimiser.param_groups[0]["lr"] = PEAK_LR * one_cycle(self.step, self.steps, WARM_UP)
        self._optimiser.step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def _moved(self, images: Tensor, clusters: Tensor, keep: Tensor, rng: torch.Generator) -> Tensor:
        """Adversarial versions of images, within the radius and [0, 1]."""
        delta = self._radius * (2 * torch.rand(images.shape, generator=rng) - 1).to(self._device)
        delta.requires_grad_()
        loss = F.cross_entropy(self.network((images + delta).clamp(0, 1), keep), clusters)
        (gradient,) = torch.autograd.grad(loss, delta)
        stepped = delta.detach() + STEP * self._radius * gradient.sign()
        return (images + stepped.clamp(-self._radius, self._radius)).clamp(0, 1)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        tensors = checkpoint("proxy", self.network, self._optimiser)
        return tensors | {"proxy/step": torch.tensor([self.step]), "proxy/losses": self.losses.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`. Raises InputError if it belongs to other images or clusters."""
        losses = entry(state, "proxy/losses", self.losses).clone()
        restore("proxy", state, self.network, self._optimiser)
        self.losses, self.step = losses, int(state["proxy/step"])

    def features(self, images: Tensor) -> Tensor:
        """Features of the network as deltas attack it: frozen, with batch normalisation in inference mode."""
        network: ProxyNetwork = self.network
        network.eval().requires_grad_(False)
        return network.features(images)

    def accuracy(self, features: Tensor) -> float:
        """Share of the clean images, given as features [n, 192], whose cluster id the proxy predicts."""
        with torch.no_grad():
            hits = self.network.head(features).argmax(1) == self._clusters
        return float(hits.float().mean())


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random crops of images [B, 3, S, S], reflected by S // 8 at the edges (4 px at 32); half are flipped."""
    side = images.shape[2]
    return take(images, random_views(len(images), side, side, crop_padding(side), rng))
