"""PIL: noise made with linear classifiers alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.fitted import FittedBaseline
from pipeline.baselines.trained.steps import Steps, scaled
from pipeline.baselines.trained.surrogate import num_labels
from pipeline.deltas.sign_step import check_finite
from pipeline.hashing import derive, torch_rng
from pipeline.relearning.training import Labelled
from pipeline.schedules import cosine

RATE = 0.003
BATCH = 512
MODEL_STEPS = 2_940  # 30 epochs of CIFAR-10; a small set gets as many steps, not as many epochs
STEPS = Steps(30, 0.1)
SHORTCUT = 0.9  # weight of the labels that the noise alone is to have


class LinearInduction(FittedBaseline):
    """PIL, perturbation-induced linearization (Liu, Chen and Zhang, ICLR 2026, arXiv 2601.19967).

    The only network is linear, without biases, trained on the plain pictures. The noise is moved so that it alone has
    the picture's label, and the picture without it no label more than another, by 30 sign steps of a tenth of epsilon
    from a random start; it is then subtracted. As in the published code, the network is a product of two matrices.
    That code trains for 30 epochs; here it is as many steps as on CIFAR-10, whatever the number of pictures.
    """

    source = "arXiv 2601.19967 and its published code: losses, steps and weights; training steps as on CIFAR-10"

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        network = linear_surrogate(pictures, settings)
        told(0.5)
        deltas = torch.zeros(pictures.images.shape)
        steps = STEPS.at(settings.effort)
        for start in range(0, len(deltas), BATCH):
            images, labels = _batch(pictures, torch.arange(start, min(start + BATCH, len(deltas))), settings.device)
            rng = torch_rng(settings.seed, "pil-noise", start)
            noise = settings.epsilon * (2 * torch.rand(images.shape, generator=rng) - 1).to(images.device)
            for step in range(steps.count):
                noise.requires_grad_()
                loss = linearisation_loss(network, images, labels, noise)
                check_finite(loss, "moving the deltas", step)
                (gradient,) = torch.autograd.grad(loss, noise)
                noise = noise.detach() - steps.size * settings.epsilon * gradient.sign()
                noise = noise.clamp(-settings.epsilon, settings.epsilon)
            deltas[start : start + BATCH] = -noise.cpu()
            told(0.5 + 0.5 * (start + len(labels)) / len(deltas))
        self.figures = {"surrogate_steps": float(scaled(MODEL_STEPS, settings.effort)), "steps": float(steps.count)}
        return deltas


def linear_surrogate(pictures: Labelled, settings: BaselineSettings) -> nn.Module:
    """The trained network: images float [B, 3, S, S] in [0, 1] -> scores [B, num_labels]."""
    count, inputs = num_labels(pictures), pictures.images[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "pil-network"))
        layers = nn.Linear(inputs, count, bias=False), nn.Linear(count, count, bias=False)
    network = nn.Sequential(nn.Flatten(), *layers).to(settings.device)
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
    steps, number = scaled(MODEL_STEPS, settings.effort), len(pictures.images)
    for step in range(steps):
        rows = (step * BATCH + torch.arange(min(BATCH, number))) % number
        images, labels = _batch(pictures, rows, settings.device)
        loss = F.cross_entropy(network(images), labels)
        check_finite(loss, "training the linear surrogate", step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.param_groups[0]["lr"] = RATE * cosine(step, steps)
        optimiser.step()
    return network.requires_grad_(False)


def linearisation_loss(network: nn.Module, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """.9 of the cross entropy of the noise alone, and .1 of KL(uniform || the picture without the noise); a mean."""
    shortcut = F.cross_entropy(network(noise), labels)
    without: Tensor = network(images - noise)
    obscured = -without.log_softmax(1).mean(1) - math.log(without.shape[1])
    return SHORTCUT * shortcut + (1 - SHORTCUT) * obscured.mean()


def _batch(pictures: Labelled, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    return pictures.images[rows].to(device).float() / 255, pictures.labels[rows].to(device)
