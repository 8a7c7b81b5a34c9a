"""What an adversary knows, and the composition of regimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.errors import SettingsError
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.training import Recipe, Regime, Training


@dataclass(frozen=True)
class Knowledge:
    """What an adversary has besides the protected images. A regime refuses at construction if it lacks something.

    num_groups     number of distinct deltas; None: as many as classes
    epsilon        their bound, in [0, 1] pixel units; for clean images, which have none, 16/255
    clean_images   clean images that are not test images, uint8 [m, 3, S, S]
    clean_labels   their labels, int64 [m]
    deltas         the true delta of each training image, int16 [n, 3, S, S] in 8-bit levels
    images         the training images as published, uint8 [n, 3, S, S]
    keys           keys of the training images, [n]
    denoisers      regime name -> the denoiser trained for it
    device         where a regime may compute before training starts
    """

    num_groups: int | None = None
    epsilon: float = 16 / 255
    clean_images: Tensor | None = None
    clean_labels: Tensor | None = None
    deltas: Tensor | None = None
    images: Tensor | None = None
    keys: Sequence[str] | None = None
    denoisers: Mapping[str, Denoiser] = field(default_factory=dict)
    device: str = "cpu"


class Composed(Regime):
    """Regimes applied one after the other, e.g. subtract+cg.

    Raises SettingsError if more than one has a loss or a schedule of its own: there is room for one, so the other
    regime would be named without having been tried.
    """

    def __init__(self, name: str, parts: Sequence[Regime]) -> None:
        self.name = name
        self.parts = tuple(parts)
        for what in ("loss", "place"):
            own = [part.name for part in parts if getattr(type(part), what) is not getattr(Regime, what)]
            if len(own) > 1:
                kind = "loss" if what == "loss" else "schedule"
                joined = " and ".join(own)
                raise SettingsError(f"regime {name!r}: {joined} each have their own {kind}; evaluate them one by one")

    def recipe(self, recipe: Recipe) -> Recipe:
        for part in self.parts:
            recipe = part.recipe(recipe)
        return recipe

    def check_network(self, network: nn.Module) -> None:
        for part in self.parts:
            part.check_network(network)

    def prepare(self, images: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        for part in self.parts:
            images = part.prepare(images, labels, seed=seed)
        return images

    def prepare_test(self, images: Tensor) -> Tensor:
        for part in self.parts:
            images = part.prepare_test(images)
        return images

    def start(self, training: Training) -> None:
        for part in self.parts:
            part.start(training)

    def batch(self, images: Tensor, rng: torch.Generator) -> Tensor:
        for part in self.parts:
            images = part.batch(images, rng)
        return images

    def loss(self, training: Training, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        own = [part for part in self.parts if type(part).loss is not Regime.loss]
        return (own or self.parts)[-1].loss(training, images, labels, rng)

    def begin_epoch(self, training: Training, epoch: int) -> None:
        for part in self.parts:
            part.begin_epoch(training, epoch)

    def place(self, training: Training) -> int | None:
        own = [part for part in self.parts if type(part).place is not Regime.place]
        return (own or self.parts)[-1].place(training)

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.end_epoch(training, epoch).items()}

    def finish(self, training: Training) -> None:
        for part in sorted(self.parts, key=lambda part: not part.chooses_weights):
            part.finish(training)

    def state(self) -> dict[str, Tensor]:
        return {f"{i}/{name}": value for i, part in enumerate(self.parts) for name, value in part.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            part.load({name.partition("/")[2]: v for name, v in state.items() if name.partition("/")[0] == str(i)})
