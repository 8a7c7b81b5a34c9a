"""REM: error-minimising noise that holds against adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.baselines.base import BaselineSettings, Told
from pipeline.baselines.trained.fitted import PUBLISHED_SURROGATE, SurrogateBaseline
from pipeline.baselines.trained.pushed import pushed_batches
from pipeline.baselines.trained.steps import Steps, resumable, scaled, sign_descent
from pipeline.baselines.trained.surrogate import cross_entropies, new_surrogate, plain_recipe, sgd_step
from pipeline.deltas.delta import levels_of
from pipeline.fitting.proxy_training import augmented
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import colour_jitter
from pipeline.relearning.regimes.adversarial import pgd
from pipeline.relearning.training import Labelled, Training

RATE = 0.1
RATE_FALLS_AT = (0.4, 0.8)  # shares of the training after which the rate is a tenth of what it was
MODEL_STEPS = 5_000
BATCH = 128
RADIUS = 0.5  # of the inner adversary, times epsilon


@dataclass(frozen=True)
class Budget:
    """What REM spends; the figures of the paper at effort 1.

    model_steps  of the surrogate
    steps        of the deltas, for each batch the surrogate is trained on
    views        random crops and flips that the gradient of each of these is taken over
    attack       steps of the inner adversary against each view, times its radius
    """

    model_steps: int
    steps: Steps
    views: int
    attack: Steps

    @classmethod
    def at(cls, effort: float) -> Budget:
        """A share of the surrogate's steps, and the same share of the 550 gradients spent on each of them.

        The three numbers whose product that is are each scaled by the cube root.
        """
        root = effort ** (1 / 3)
        return cls(scaled(MODEL_STEPS, effort), Steps(10, 0.2).at(root), scaled(5, root), Steps(10, 0.2).at(root))

    @property
    def gradients(self) -> int:
        """Gradients a batch of pictures costs whenever its deltas are made."""
        return self.steps.count * self.views * (self.attack.count + 1)


class RobustErrorMinimising(SurrogateBaseline):
    """REM (Fu et al., ICLR 2022): EM against a surrogate in adversarial training, of radius epsilon / 2.

    For each batch: deltas from a random start by 10 sign steps, each along the mean gradient of 5 random crops and
    flips with an adversary's 10 steps added to each of them; then one step of the surrogate on adversarial pictures.
    After 5,000 of these, one pass makes all deltas anew. Figures state what was spent of the published budget.

    colour  REM-T (Dang et al., section IV-C5): crops and flips also get random colour jitter and grey, as in nt-cg
    """

    source = "Fu et al., ICLR 2022: published steps, views and adversary; T: Dang et al., section IV-C5"

    def __init__(self, surrogate: str = PUBLISHED_SURROGATE, *, colour: bool = False) -> None:
        super().__init__(surrogate)
        self.colour = colour

    def passes(self, images: int, effort: float) -> float:
        budget = Budget.at(effort)
        of_step = budget.gradients + budget.attack.count + 1
        return budget.model_steps * min(BATCH, images) * of_step + images * budget.gradients

    def fit(self, pictures: Labelled, settings: BaselineSettings, told: Told) -> Tensor:
        budget = Budget.at(settings.effort)
        surrogate = self.robust_surrogate(pictures, settings, budget, told)
        deltas = torch.zeros(pictures.images.shape, device=surrogate.device)
        for rows, images, labels in pushed_batches(surrogate, settings, deltas):
            rng = torch_rng(settings.seed, "rem-last", rows.start)
            deltas[rows] = robust_deltas(
                *(surrogate, images, labels), epsilon=settings.epsilon, budget=budget, rng=rng, colour=self.colour
            )
        self.figures = {"surrogate_steps": float(budget.model_steps), "gradients_for_a_delta": float(budget.gradients)}
        return deltas

    def robust_surrogate(self, pictures: Labelled, settings: BaselineSettings, budget: Budget, told: Told) -> Training:
        """A surrogate trained on adversarial versions of protected pictures; in inference mode, frozen."""
        epsilon, most = settings.epsilon, levels_of(settings.epsilon)
        surrogate = new_surrogate(self.surrogate, pictures, settings, plain_recipe(1))
        for step in resumable(settings, "steps", budget.model_steps, surrogate):
            rng = torch_rng(settings.seed, "rem-step", step)
            rows = torch.randperm(len(pictures.images), generator=rng)[:BATCH].to(surrogate.device)
            images, labels = surrogate.images[rows].float() / 255, surrogate.labels[rows]
            surrogate.network.eval().requires_grad_(False)
            deltas = robust_deltas(
                *(surrogate, images, labels), epsilon=epsilon, budget=budget, rng=rng, colour=self.colour
            )
            whole = (deltas * 255).round().clamp(-most, most) / 255
            seen = _seen((images + whole).clamp(0, 1), rng, self.colour)
            moved = _attacked(surrogate, seen, labels, epsilon, budget, rng)
            surrogate.network.train().requires_grad_(True)
            fallen = sum(step >= share * budget.model_steps for share in RATE_FALLS_AT)
            sgd_step(surrogate, F.cross_entropy(surrogate.scores(moved), labels), RATE * 0.1**fallen)
            told((step + 1) / (budget.model_steps + 1))
        surrogate.network.eval().requires_grad_(False)
        return surrogate


def robust_deltas(
    surrogate: Training,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    budget: Budget,
    rng: torch.Generator,
    colour: bool = False,
) -> Tensor:
    """Deltas of a batch that lower the loss an adversary leaves, from a random start; see RobustErrorMinimising."""

    def robust_losses(moved: Tensor) -> Tensor:
        losses = torch.zeros(len(moved), device=moved.device)
        for _ in range(budget.views):
            seen = _seen(moved, rng, colour)
            shift = _attacked(surrogate, seen.detach(), labels, epsilon, budget, rng) - seen.detach()
            losses = losses + cross_entropies(surrogate, labels, seen + shift)  # the adversary is passed straight
        return losses

    start = epsilon * (2 * torch.rand(images.shape, generator=rng) - 1).to(images.device)
    return sign_descent(robust_losses, images, start, epsilon, budget.steps)


def _seen(images: Tensor, rng: torch.Generator, colour: bool) -> Tensor:
    seen = augmented(images, rng)
    return colour_jitter(seen, rng) if colour else seen


def _attacked(
    surrogate: Training, images: Tensor, labels: Tensor, epsilon: float, budget: Budget, rng: torch.Generator
) -> Tensor:
    """Images as the inner adversary leaves them, from a random start."""
    radius = RADIUS * epsilon
    return pgd(
        surrogate.scores,
        images,
        labels,
        epsilon=radius,
        step=budget.attack.size * radius,
        steps=budget.attack.count,
        offset=radius * (2 * torch.rand(images.shape, generator=rng) - 1).to(images.device),
    )
