"""Training of a universal generator, step by step, in one process or data-parallel in several."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.deltas.sign_step import check_finite
from pipeline.deltas.universal.generator import UniversalGenerator, bounded_output
from pipeline.errors import InputError, SettingsError
from pipeline.hashing import torch_rng
from pipeline.one_for_all.losses import LOSSES, Concepts, select_by_label, select_concepts, similarities
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.pictures.augment import Views, random_views, take
from pipeline.schedules import cosine
from pipeline.surrogates.surrogate import Surrogate

CURVES = ("loss", "near", "opposite", "near_clean", "opposite_clean")


@dataclass(frozen=True)
class TrainingImages:
    """What a generator is trained on.

    pixels  uint8 [n, 3, R, R], R the side plus a margin for cropping
    labels  int64 [n], row indices into the bank; needed if targets are chosen by label
    """

    pixels: Tensor
    labels: Tensor | None = None


class UniversalFit:
    """A universal generator in training (Chen et al. 2024, section 3.4).

    Every step draws crops and flips for a global batch, runs the generator on each image and its clean embedding, adds
    the bounded delta, and reduces the loss on the perturbed embeddings. Under torch.distributed every process takes an
    equal part of each batch; batch statistics and loss cover the whole batch, so that any number of processes takes the
    same steps (up to the order of sums).

    bank  float [m, d], in the surrogate's embedding space
    Raises SettingsError for an unsuitable bank or batch size, InputError if there are fewer images than a batch.
    """

    def __init__(
        self,
        images: TrainingImages,
        surrogate: Surrogate,
        bank: Tensor,
        settings: OneForAllSettings,
        device: str = "cpu",
    ) -> None:
        self.settings, self.surrogate, self.images = settings, surrogate, images
        self.device = torch.device(device)
        self.side = settings.side_for(surrogate.input_size)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        _check_fit(images, surrogate, bank, settings, self.world)
        self.bank = F.normalize(bank.float(), dim=1).to(self.device)
        network = UniversalGenerator(
            surrogate.dimension, width=settings.width, blocks=settings.blocks, seed=settings.seed
        )
        self.generator = _shared_norms(network, self.device, self.world).to(self.device)
        self.generator = self.generator.to(memory_format=torch.channels_last)
        self._trained: nn.Module = DistributedDataParallel(self.generator) if self.world > 1 else self.generator
        self.optimiser = torch.optim.Adam(
            self.generator.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.per_epoch = len(images.pixels) // settings.batch_size
        self.steps = settings.steps_for(len(images.pixels))
        self.step = 0
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}

    @property
    def is_done(self) -> bool:
        return self.step >= self.steps

    @property
    def progress(self) -> float:
        """Share of the steps taken so far."""
        return self.step / self.steps

    def advance(self, steps: int) -> None:
        """Take up to `steps` steps. Raises PromiseError for a non-finite loss, before it is applied."""
        for _ in range(min(steps, self.steps - self.step)):
            self._advance()

    def _advance(self) -> None:
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * cosine(self.step, self.steps)
        self.generator.train()
        self.optimiser.zero_grad(set_to_none=True)
        seen = torch.zeros(len(CURVES), device=self.device)
        rows, windows = self._batch(), self._windows()
        size = settings.batch_size // settings.accumulate
        for start in range(0, settings.batch_size, size):
            part = slice(start, start + size)
            is_last = start + size == settings.batch_size
            with contextlib.nullcontext() if is_last or self.world == 1 else self._trained.no_sync():  # type: ignore[operator]
                seen += self._lower(rows[part], _rows_of(windows, part)) / settings.accumulate
        self.optimiser.step()
        for name, value in zip(CURVES, seen.tolist(), strict=True):
            self.curves[name].append(value)
        self.step += 1

    def _batch(self) -> Tensor:
        """Image indices of this step's global batch."""
        epoch, number = divmod(self.step, self.per_epoch)
        order = torch.randperm(len(self.images.pixels), generator=torch_rng(self.settings.seed, "14a-epoch", epoch))
        return order[number * self.settings.batch_size :][: self.settings.batch_size]

    def _windows(self) -> Views:
        """Crops and flips for this step's global batch, identical on every process."""
        rng = torch_rng(self.settings.seed, "14a-views", self.step)
        return random_views(self.settings.batch_size, self.images.pixels.shape[-1], self.side, 0, rng)

    def _lower(self, rows: Tensor, windows: Views) -> Tensor:
        """Add the gradient of one part of a batch; returns its figures, in the order of CURVES."""
        mine = slice(self.rank, None, self.world)
        views = take(self.images.pixels[rows[mine]].to(self.device), _rows_of(windows, mine))
        clean = views.float().div_(255).contiguous(memory_format=torch.channels_last)
        with self._autocast():
            with torch.no_grad():
                embeddings = self.surrogate.embed(clean, resize=True)
            raw = self._trained(clean, F.normalize(embeddings, dim=1))
            delta = bounded_output(raw.float(), self.settings.epsilon, self.settings.bound)
            features = self.surrogate.embed((clean + delta).clamp(0, 1), resize=True)
        features, embeddings = self._gathered(features.float()), self._gathered(embeddings.float())
        concepts = self._concepts(embeddings, features, rows)
        loss = LOSSES[self.settings.loss](features, concepts)
        check_finite(loss, "universal generator", self.step)
        (loss / self.settings.accumulate).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            near, opposite = similarities(features, concepts)
            before, before_opposite = similarities(embeddings, concepts)
            return torch.stack([loss, near.mean(), opposite.mean(), before.mean(), before_opposite.mean()])

    def _gathered(self, features: Tensor) -> Tensor:
        """Features of the whole batch, in order, differentiable."""
        if self.world == 1:
            return features
        places = features.new_zeros(len(features), self.world, features.shape[1])
        places[:, self.rank] = features
        return _summed(places).flatten(0, 1)

    def _concepts(self, embeddings: Tensor, features: Tensor, rows: Tensor) -> Concepts:
        if self.settings.select_by == "label":
            assert self.images.labels is not None
            return select_by_label(self.images.labels[rows].to(self.device), self.bank, self.settings.near)
        chosen = features if self.settings.select_by == "perturbed_embedding" else embeddings
        return select_concepts(chosen, self.bank, self.settings.near)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name, for safetensors."""
        tensors = {f"generator/{name}": value for name, value in self.generator.state_dict().items()}
        for number, parameter in enumerate(self.generator.parameters()):
            for name, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam/{number}/{name}"] = value
        tensors |= {f"curve/{name}": torch.tensor(values) for name, values in self.curves.items()}
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`."""
        weights = {n.removeprefix("generator/"): value for n, value in state.items() if n.startswith("generator/")}
        self.generator.load_state_dict(weights)
        for number, parameter in enumerate(self.generator.parameters()):
            prefix = f"adam/{number}/"
            moments = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
            if moments:
                kept = {name: value if name == "step" else value.to(self.device) for name, value in moments.items()}
                self.optimiser.state[parameter] = kept
        self.curves = {name: state[f"curve/{name}"].tolist() for name in CURVES}
        self.step = len(self.curves["loss"])


def _rows_of(views: Views, part: slice) -> Views:
    return Views(views.rows[part], views.columns[part])


class _Summed(torch.autograd.Function):
    """Sum over all processes; the gradient is summed likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Summed.apply(values)
    return total


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with statistics over all processes; torch's own implementation needs a GPU."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return super().forward(maps)
        count = maps.numel() // maps.shape[1] * dist.get_world_size()
        sums = torch.stack([maps.sum((0, 2, 3)), maps.square().sum((0, 2, 3))])
        mean, square = _summed(sums) / count
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean: Tensor
            self.running_var: Tensor
            self.running_mean.lerp_(mean, self.momentum or 0.1)
            self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum or 0.1)
        scale = self.weight / (variance + self.eps).sqrt()
        normalised: Tensor = maps * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return normalised


def _shared_norms(network: nn.Module, device: torch.device, world: int) -> nn.Module:
    """The network with batch normalisation over all processes, if there are several."""
    if world == 1:
        return network
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupBatchNorm2d
    return network


def check_bank(bank: Tensor, dimension: int, settings: OneForAllSettings) -> None:
    """Raise SettingsError unless the concepts suit the surrogate and the loss.

    bank       float [m, d]
    dimension  of the surrogate's features
    """
    if bank.ndim != 2 or bank.shape[1] != dimension:
        raise SettingsError(
            f"--concepts: embeddings {tuple(bank.shape)} do not match the surrogate's dimension {dimension}; "
            "make them with the same surrogate"
        )
    if len(bank) <= settings.near:
        raise SettingsError(f"--near {settings.near}: the bank has only {len(bank)} concepts")


def check_batch(settings: OneForAllSettings, world: int) -> None:
    """Raise SettingsError unless a batch can be divided among `world` workers."""
    if settings.batch_size % (settings.accumulate * world):
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be divided among {world} workers in {settings.accumulate} parts"
        )


def _check_fit(
    images: TrainingImages, surrogate: Surrogate, bank: Tensor, settings: OneForAllSettings, world: int
) -> None:
    check_bank(bank, surrogate.dimension, settings)
    check_batch(settings, world)
    if len(images.pixels) < settings.batch_size:
        raise InputError(f"only {len(images.pixels)} images, fewer than --batch-size {settings.batch_size}")
    if settings.select_by == "label" and images.labels is None:
        raise SettingsError("--select-by label needs a .cls label for every image: a row of the concept bank")
    if settings.select_by == "label" and images.labels is not None and int(images.labels.max()) >= len(bank):
        raise InputError(
            f"--select-by label: label {int(images.labels.max())} is no row of the concept bank, which has {len(bank)}"
        )
