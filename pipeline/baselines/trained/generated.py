"""DeepConfuse: a generator of noise that leads training astray, trained through one look-ahead step."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.checkpoints import Weights
from pipeline.baselines.trained.fitted import SurrogateBaseline
from pipeline.baselines.trained.steps import resumable, scaled
from pipeline.baselines.trained.surrogate import batches, new_surrogate, plain_recipe, seconds_each, sgd_step
from pipeline.deltas.sign_step import check_finite
from pipeline.hashing import derive, torch_rng
from pipeline.relearning.denoisers.denoiser import UNet
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.training import Labelled, Training

EPOCHS = 1_000
BATCH = 256
RATE = 0.01
GENERATOR_RATE = 1e-4
LARGEST_GENERATOR_RATE = 2e-3
RECIPE = replace(plain_recipe(1), momentum=0.0, weight_decay=0.0)  # of the surrogate
MULTIPLE = 8  # the generator takes pictures whose sides are multiples of this


class DeepConfuse(SurrogateBaseline):
    """DeepConfuse (Feng, Cai and Zhou, NeurIPS 2019): epsilon times tanh of a U-Net that sees the picture.

    1,000 epochs, each with a fresh surrogate that is trained for 20 on the noise of the generator as it was when the
    epoch began. For each batch, the generator is moved so that one such step from here would leave the surrogate with a
    large loss on the clean pictures. With fewer epochs its learning rate is larger, at most 2e-3. The paper keeps the
    generator with the lowest test accuracy; this keeps the last. The U-Net is the one of the denoisers, not the
    authors', and they use VGG-11. Days on a GPU at effort 1.

    width             channels of the U-Net
    surrogate_epochs  for which each surrogate is trained
    """

    source = "Feng, Cai and Zhou, NeurIPS 2019: published loop and rates, another U-Net, no choice by test accuracy"
    width = 64
    surrogate_epochs = 20

    def passes(self, images: int, effort: float) -> float:
        """Of a picture through both networks, as an epoch of a surrogate takes it."""
        return scaled(EPOCHS, effort) * self.surrogate_epochs * images

    def seconds_of_pass(self, some: Labelled, settings: BaselineSettings) -> float:
        generator, optimiser = self._generator(settings)
        surrogate, frozen = new_surrogate(self.surrogate, some, settings, RECIPE), copy.deepcopy(generator)
        surrogate.network.train()
        return seconds_each(
            len(some.images),
            lambda: _train_both(surrogate, generator, frozen.requires_grad_(False), optimiser, settings.epsilon, 0),
        )

    def _generator(self, settings: BaselineSettings) -> tuple[UNet, torch.optim.Optimizer]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, "deepconfuse-generator"))
            generator = UNet(self.width).to(settings.device)
        rate = min(LARGEST_GENERATOR_RATE, GENERATOR_RATE * EPOCHS / scaled(EPOCHS, settings.effort))
        return generator, torch.optim.Adam(generator.parameters(), lr=rate)

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        epochs, epsilon = scaled(EPOCHS, settings.effort), settings.epsilon
        generator, optimiser = self._generator(settings)
        for epoch in resumable(settings, "epochs", epochs, Weights(generator, optimiser)):
            fresh = replace(settings, seed=derive(settings.seed, "deepconfuse-surrogate", epoch))
            surrogate = new_surrogate(self.surrogate, pictures, fresh, RECIPE)
            frozen = copy.deepcopy(generator).requires_grad_(False)
            surrogate.network.train()
            with named_randomness(surrogate, "deepconfuse"):
                for number in range(self.surrogate_epochs):
                    _train_both(surrogate, generator, frozen, optimiser, epsilon, number)
            told((epoch + 1) / epochs)
        self.figures = {"epochs": float(epochs)}
        surrogate = new_surrogate(self.surrogate, pictures, settings, RECIPE)  # only for its batches
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        with torch.no_grad():
            for rows, images, _ in batches(surrogate):
                deltas[rows] = generated(generator, images, epsilon)
        return deltas


def generated(generator: UNet, images: Tensor, epsilon: float) -> Tensor:
    """The generator's deltas of images, float [B, 3, S, S] in [0, 1]."""
    side = images.shape[-1]
    room = -side % MULTIPLE
    wide = F.pad(images, (0, room, 0, room), mode="replicate")
    along = torch.linspace(-1, 1, side + room, device=images.device).expand(len(images), 1, side + room, -1)
    raw = generator(wide, torch.cat([along, along.transpose(2, 3)], 1))[:, :, :side, :side]
    return epsilon * torch.tanh(raw)


def clean_loss_ahead(surrogate: Training, images: Tensor, labels: Tensor, deltas: Tensor) -> Tensor:
    """Loss on images after one SGD step of the surrogate on images + deltas; a gradient reaches the deltas."""
    weights = dict(surrogate.network.named_parameters())
    loss = F.cross_entropy(_scores(surrogate, (images + deltas).clamp(0, 1)), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    ahead = {name: weight - RATE * slope for (name, weight), slope in zip(weights.items(), gradients, strict=True)}
    scores = functional_call(surrogate.network, ahead, (surrogate.normalise(images),))
    return F.cross_entropy(scores, labels)


def _train_both(
    surrogate: Training,
    generator: UNet,
    frozen: UNet,
    optimiser: torch.optim.Optimizer,
    epsilon: float,
    number: int,
) -> None:
    """One epoch of a surrogate on the frozen generator's noise, and of the other generator."""
    order = torch.randperm(len(surrogate.images), generator=torch_rng(surrogate.seed, "deepconfuse-order", number))
    for rows in torch.split(order.to(surrogate.device), BATCH):
        if len(rows) == 1:
            continue  # batch normalisation needs two
        images, labels = surrogate.images[rows].float() / 255, surrogate.labels[rows]
        loss = -clean_loss_ahead(surrogate, images, labels, generated(generator, images, epsilon))
        check_finite(loss, "training the generator", number)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        protected = (images + generated(frozen, images, epsilon)).clamp(0, 1)
        sgd_step(surrogate, F.cross_entropy(_scores(surrogate, protected), labels), RATE)


def _scores(surrogate: Training, images: Tensor) -> Tensor:
    """Scores in full precision, which derivatives of derivatives need."""
    scores: Tensor = surrogate.network(surrogate.normalise(images))
    return scores
