"""Inputs and outputs of fits, and the interface they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError
from pipeline.fitting.fit_images import stacked_pictures


@dataclass(frozen=True)
class FitImages:
    """The clean images that deltas are fitted on.

    pixels    uint8 [n, 3, S, S]
    clusters  int64 [n]
    """

    pixels: Tensor
    clusters: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or self.pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 [n, 3, S, S], not {self.pixels.dtype} {shape}")
        if self.clusters.shape != shape[:1] or self.clusters.dtype != torch.int64 or shape[0] == 0:
            raise ValueError(
                f"{shape[0]} images need clusters int64 [n]; got {self.clusters.dtype} {tuple(self.clusters.shape)}"
            )

    @property
    def side(self) -> int:
        return int(self.pixels.shape[2])


def fit_images_from(tables: Iterable[pa.Table], *, side: int) -> FitImages:
    """Pictures from tables, as stacked_pictures; raises InputError if there are none."""
    pixels, clusters, _ = stacked_pictures(tables, side=side)
    return FitImages(torch.from_numpy(pixels), torch.from_numpy(clusters))


@dataclass(frozen=True)
class FittedDeltas:
    """The finished deltas of k clusters, in whole 8-bit levels, with figures from the fit.

    clusters  k cluster indices
    targets   the target cluster of each
    levels    int8 [k, 3, S, S]; None if every image gets its own delta
    losses    float32 [k, steps]; if a batch had no image of the cluster, the previous value is repeated
    moved     float32 [k]: share of the cluster's protected images whose nearest centroid is the target's, in the
              features of the network deltas were optimised through; nan for a cluster without images
    before    float32 [k]: the same share for the clean images
    rms       float32 [k]: root mean square of the delta, in 8-bit levels
    clamped   float32 [k]: share of values at the bound
    extra     generator weights and sigma ("<cluster>/..."), or the proxy's loss curve and accuracy ("proxy/...") and,
              if every image gets its own delta, the weights of the proxies ("proxies.…")
    """

    clusters: tuple[int, ...]
    targets: tuple[int, ...]
    levels: Tensor | None
    losses: Tensor
    moved: Tensor
    before: Tensor
    rms: Tensor
    clamped: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """One safetensors file; equal contents give equal bytes."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        tensors |= {} if self.levels is None else {"levels": self.levels.contiguous()}
        tensors |= {name: torch.tensor(getattr(self, name)) for name in ("clusters", "targets")}
        return save(tensors | {f"extra/{name}": value.contiguous() for name, value in self.extra.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> FittedDeltas:
        """The inverse of to_bytes. Raises InputError if `data` is not such a file."""
        try:
            tensors = load(data)
            extra = {n.removeprefix("extra/"): t for n, t in tensors.items() if n.startswith("extra/")}
            values: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            values |= {name: tuple(tensors[name].tolist()) for name in ("clusters", "targets")}
            values["levels"] = tensors.get("levels")
            return cls(**values, extra=extra)
        except (SafetensorError, KeyError) as error:
            raise InputError(f"not a file of fitted deltas, or truncated: {error}; delete it to refit") from None


_TENSORS = ("losses", "moved", "before", "rms", "clamped")


def merge(parts: Iterable[FittedDeltas]) -> FittedDeltas:
    """Combine the deltas of several files, ordered by cluster.

    A fit of fewer steps than another repeats its last loss: with --epochs, a cluster's steps depend on its images.
    Raises ConflictError if two parts contain the same cluster.
    """
    ordered = sorted(parts, key=lambda part: part.clusters)
    steps = max((part.losses.shape[1] for part in ordered), default=0)
    ordered = [replace(part, losses=_lengthened(part.losses, steps)) for part in ordered]
    clusters = tuple(cluster for part in ordered for cluster in part.clusters)
    if len(set(clusters)) != len(clusters):
        raise ConflictError(f"a cluster was fitted twice: {sorted(clusters)}")
    order = torch.tensor(clusters).argsort()
    targets = torch.tensor([target for part in ordered for target in part.targets])[order]
    levels = [part.levels for part in ordered if part.levels is not None]
    return FittedDeltas(
        clusters=tuple(sorted(clusters)),
        targets=tuple(targets.tolist()),
        levels=torch.cat(levels)[order] if levels else None,
        extra={name: value for part in ordered for name, value in part.extra.items()},
        **{name: torch.cat([getattr(part, name) for part in ordered])[order] for name in _TENSORS},
    )


def _lengthened(losses: Tensor, steps: int) -> Tensor:
    missing = steps - losses.shape[1] if losses.shape[1] else 0
    return torch.cat([losses, losses[:, -1:].expand(-1, missing)], 1)


class Fit(Protocol):
    """A fit that can be stopped at any step: load(state()) in a new one resumes to bit-identical deltas.

    On a GPU, those of a generator network may differ in single levels: sums of its padding's gradients vary.
    """

    @property
    def is_done(self) -> bool: ...

    @property
    def progress(self) -> float:
        """Share of steps done, 0 ... 1."""

    def advance(self, steps: int) -> None:
        """Take at most `steps` more steps. Raises PromiseError for a non-finite loss."""

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as a flat dict for safetensors."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`. Raises InputError if it belongs to another fit."""

    def result(self) -> FittedDeltas:
        """The finished deltas; call only when is_done."""


def checkpoint(prefix: str, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and optimiser moments of a network, on the CPU, with names starting with `prefix`."""
    tensors = {f"{prefix}/net/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for moment, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/optimiser/{moment}/{name}"] = value
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def restore(prefix: str, state: Mapping[str, Tensor], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """The inverse of checkpoint. Copies in place, because a different memory layout could change the last bits."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(entry(state, f"{prefix}/net/{name}", value))
    optimiser.state.clear()
    parameters = dict(module.named_parameters())
    for name, value in state.items():
        if name.startswith(f"{prefix}/optimiser/"):
            moment, _, owner = name.removeprefix(f"{prefix}/optimiser/").partition("/")
            parameter = parameters[owner]
            # Adam keeps its step count on the CPU; whatever has the parameter's shape is on its device.
            same = value.shape == parameter.shape and moment != "step"
            kept = torch.empty_like(parameter).copy_(value) if same else value.clone()
            optimiser.state[parameter][moment] = kept.detach()


def entry(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """state[name]; raises InputError if it is missing or its shape differs from `like`."""
    value = state.get(name)
    if value is None or value.shape != like.shape:
        seen = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise InputError(f"checkpoint of another fit: {name} {seen}, expected {tuple(like.shape)}; delete it")
    return value
