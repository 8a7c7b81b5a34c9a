"""Progressive Staged Training: ST, ST-CG and ST-Full (Dang et al., section III-B, Alg. 1 and Table I).

After each epoch the activation cluster measure (ACM) says how far the network has fallen for what the deltas teach. If
that is too far, the epoch is rolled back and the shallow layers learn more slowly from then on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import SettingsError
from pipeline.hashing import derive
from pipeline.relearning.regimes.requirements import named_randomness
from pipeline.relearning.regimes.staged.acm import REDUCTIONS, VARIANTS, activation_cluster_measure, validation_rows
from pipeline.relearning.regimes.staged.layers import GRANULARITIES, ordered_layers
from pipeline.relearning.regimes.staged.multipliers import MULTIPLIERS, layer_multipliers
from pipeline.relearning.regimes.staged.pseudo_labels import pseudo_labels
from pipeline.relearning.regimes.views.colour import ColourAndGray, PaperColour
from pipeline.relearning.training import Regime
from pipeline.settings import near_matches

if TYPE_CHECKING:
    from pipeline.relearning.training import Recipe, Training

REJECTED = ("counted", "repeated")
MOST_TIMES = 3  # the epochs asked for, where rejected ones are repeated; the paper's ST takes 2.6 times as long as NT
ACM_LABELS = ("labels", "pseudo")
COLOURS = ("strong", "paper")


def _check_name(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingsError(f"{what} {value!r} is not one of {', '.join(known)}{near_matches(value, list(known))}")


@dataclass(frozen=True)
class StagedOptions:
    """What the paper leaves open or our text of it lacks; do not choose any of these by test accuracy.

    variant      reading of the ACM, a name in acm.VARIANTS
    reduce       reduction of the features to two dimensions: tsne (the paper), pca2 (far cheaper) or none
    multiplier   how learning rates fall with the count, a name in multipliers.MULTIPLIERS
    granularity  what a layer is: block, module or stage
    kappa        threshold as a multiple of the median ACM of the first epochs
    window       how many epochs these are: the "golden window", in which networks still learn both kinds of features
                 (section III-A); the paper's epochs have 390 steps
    gamma        a fixed threshold instead, from the first epoch on
    beta         layers by which the front moves per rejected epoch; None: 2 L / E, which, if all epochs are rejected,
                 reaches the head after half of them
    rejected     counted: a rejected epoch is one of the epochs asked for, which bounds the cost; repeated: it is not,
                 and the schedule waits for the next that is kept, up to three times as many epochs
    acm_labels   labels, or pseudo: k-means of the features, for deltas that follow clusters rather than classes
    cg           colour jitter and grey: strong, as in nt-cg, or paper; has no effect on ST alone
    Raises SettingsError for an unknown name, with near matches, and for kappa <= 0, beta < 0 or window < 1.
    """

    variant: str = "db_inverse"
    reduce: str = "tsne"
    multiplier: str = "linear_front"
    granularity: str = "block"
    kappa: float = 1.5
    window: int = 2
    gamma: float | None = None
    beta: float | None = None
    rejected: str = "counted"
    acm_labels: str = "labels"
    cg: str = "strong"

    def __post_init__(self) -> None:
        _check_name("variant", self.variant, list(VARIANTS))
        _check_name("reduce", self.reduce, REDUCTIONS)
        _check_name("multiplier", self.multiplier, list(MULTIPLIERS))
        _check_name("granularity", self.granularity, GRANULARITIES)
        _check_name("rejected", self.rejected, REJECTED)
        _check_name("acm_labels", self.acm_labels, ACM_LABELS)
        _check_name("cg", self.cg, COLOURS)
        if not self.kappa > 0:
            raise SettingsError(f"kappa must be above 0; it is {self.kappa}")
        if self.beta is not None and not self.beta >= 0:
            raise SettingsError(f"beta must not be negative; it is {self.beta}")
        if self.window < 1:
            raise SettingsError(f"window must be at least 1 epoch; it is {self.window}")

    def __str__(self) -> str:
        """What differs from the defaults, e.g. '[reduce=pca2,kappa=2]', or nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        shown = ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        return f"[{shown}]" if shown else ""


def parse_options(text: str) -> StagedOptions:
    """'reduce=pca2,kappa=2' -> options. Raises SettingsError for unknown names and invalid values."""
    numbers = {"kappa": float, "gamma": float, "beta": float, "window": int}
    known = [f.name for f in fields(StagedOptions)]
    values: dict[str, Any] = {}
    for setting in filter(None, text.split(",")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise SettingsError(f"ST option {setting!r} is not of the form name=value")
        _check_name("ST option", key, known)
        try:
            values[key] = numbers[key](value) if key in numbers else value
        except ValueError:
            kind = "a whole number" if numbers[key] is int else "a number"
            raise SettingsError(f"ST option {key} must be {kind}; it is {value!r}") from None
    return StagedOptions(**values)


class ProgressiveTraining(Regime):
    """ST: an epoch after which the ACM exceeds the threshold is rolled back and counted.

    The ACM is measured on up to 1,000 protected training images, in inference mode and without augmentation. Rejecting
    an epoch restores weights, buffers and momentum from the end of the previous epoch; it is one of the epochs asked
    for, and the schedule goes on, unless `rejected` says that it is repeated. The first epochs set the threshold and
    are always kept, unless `gamma` is given.
    """

    name = "st"

    def __init__(self, options: StagedOptions = StagedOptions()) -> None:  # noqa: B008  frozen
        self.name = f"{self.name}{options}"
        self.options = options
        self.count = 0
        self.references: list[float] = []  # ACM of the first epochs
        self._layer_of: list[int] = []  # of each parameter group
        self._before: dict[str, Any] = {}  # weights at the start of the epoch

    def start(self, training: Training) -> None:
        self.count, self.references = 0, []
        layers = ordered_layers(training.network, self.options.granularity)
        depth = {name: number for number, names in enumerate(layers) for name in names}
        self._layer_of = [depth[group["name"]] for group in training.optimiser.param_groups]
        self._num_layers = len(layers)
        self._rows = validation_rows(training.labels.cpu().numpy(), seed=derive(training.seed, "st"))

    def begin_epoch(self, training: Training, epoch: int) -> None:
        """Learning rates by layer for the count so far (Alg. 1, lines 4 and 9)."""
        self._before = training.weights()
        beta = self.options.beta
        if beta is None:
            beta = 2 * self._num_layers / training.recipe.epochs
        factors = layer_multipliers(self.options.multiplier, self.count, self._num_layers, beta)
        training.lr_factors = [factors[layer] for layer in self._layer_of]

    def place(self, training: Training) -> int | None:
        done, asked = len(training.history), training.recipe.epochs
        if self.options.rejected == "counted":
            return super().place(training)
        kept = done - self.count
        return kept if kept < asked and done < MOST_TIMES * asked else None

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        """Alg. 1, lines 6-8. Figures: acm, acm_raw (not reduced), count, rejected (0 or 1).

        The ACM of non-finite features is nan; the training will be reported as diverged.
        """
        acm, acm_raw = self._measure(training)
        rejected = acm > self.threshold()
        if len(self.references) < self.options.window:
            self.references.append(acm)
        if rejected:
            self.count += 1
            training.restore(self._before)
        self._before = {}
        return {"acm": acm, "acm_raw": acm_raw, "count": float(self.count), "rejected": float(rejected)}

    def threshold(self) -> float:
        """ACM above which an epoch is rejected; infinite until it is known.

        kappa times the median m of the first epochs, computed as m + (kappa - 1) |m| because `gap` may be negative.
        """
        if self.options.gamma is not None:
            return self.options.gamma
        if len(self.references) < self.options.window:
            return float("inf")
        median = statistics.median(self.references)
        return median + (self.options.kappa - 1) * abs(median)

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "references": torch.tensor(self.references, dtype=torch.float64)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])
        self.references = state["references"].tolist()

    def _measure(self, training: Training) -> tuple[float, float]:
        rows = torch.from_numpy(self._rows).to(training.device)
        features: NDArray[np.float32] = training.features(training.images[rows]).cpu().numpy()
        if not np.isfinite(features).all():
            return float("nan"), float("nan")
        labels: NDArray[np.int64] = training.labels[rows].cpu().numpy()
        options, seed = self.options, derive(training.seed, "st")
        if options.acm_labels == "pseudo":
            labels = pseudo_labels(features, len(np.unique(labels)), seed=seed)
            if (np.bincount(labels) > 1).sum() < 2:  # of a dead network all features are one cluster
                return 0.0, 0.0
        acm, acm_raw = (
            activation_cluster_measure(features, labels, variant=options.variant, reduce=reduce, seed=seed)
            for reduce in (options.reduce, "none")
        )
        return acm, acm_raw


class ProgressiveColour(ProgressiveTraining):
    """ST-CG: ST on colour-jittered and grey views, as in NT-CG, at twice the learning rate (section IV-A4).

    With cg=paper the views are those of the regime cg-paper.
    """

    name = "st-cg"

    def __init__(self, options: StagedOptions = StagedOptions()) -> None:  # noqa: B008  frozen
        super().__init__(options)
        self._colour = PaperColour() if options.cg == "paper" else ColourAndGray()

    def recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe, lr=2 * recipe.lr)

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return self._colour.batch(images, rng)


class ProgressiveFull(ProgressiveColour):
    """ST-Full: ST-CG, then all layers fine-tuned on colour-jittered and grey views (section III-B, last paragraph).

    The paper gives neither rate nor length of the fine-tuning. We use half as many epochs, a cosine from a tenth of
    NT's learning rate (a twentieth of ST-CG's) to zero, and reset momentum.
    """

    name = "st-full"

    def finish(self, training: Training) -> None:
        """Fine-tune; the time is added to the training's, but the epochs are not part of the history."""
        started = time.perf_counter()
        recipe, seed = training.recipe, training.seed
        epochs = (recipe.epochs + 1) // 2
        training.recipe = replace(recipe, lr=recipe.lr / 20, schedule="cosine", epochs=epochs)
        training.seed = derive(seed, "st-full-fine-tune")  # orders and views that differ from the earlier epochs'
        training.lr_factors = [1.0] * len(training.lr_factors)
        training.optimiser.state.clear()
        for epoch in range(epochs):
            with named_randomness(training, f"fine-tune-{epoch}"):
                training.run_epoch(epoch)
        training.recipe, training.seed = recipe, seed
        training.seconds += time.perf_counter() - started


STAGED: dict[str, type[ProgressiveTraining]] = {
    "st": ProgressiveTraining,
    "st-cg": ProgressiveColour,
    "st-full": ProgressiveFull,
}


def staged_regime(text: str) -> ProgressiveTraining:
    """The regime of a name with options, e.g. 'st-cg[reduce=pca2,kappa=2]'. Raises SettingsError."""
    name, _, options = text.partition("[")
    _check_name("regime with options", name, list(STAGED))
    if not options.endswith("]"):
        raise SettingsError(f"regime {text!r}: put options in brackets, for example {name}[kappa=2]")
    parsed = parse_options(options[:-1])
    if name == "st" and parsed.cg != StagedOptions.cg:
        raise SettingsError(f"regime {text!r}: ST alone has no colour jitter; cg is an option of st-cg and st-full")
    return STAGED[name](parsed)
