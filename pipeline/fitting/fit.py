"""What goes into a fit of deltas and what comes out of it, and the one interface of all fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError


@dataclass(frozen=True)
class FitImages:
    """The clean images that deltas are fitted on: pixels uint8 [n, 3, S, S], clusters int64 [n]."""

    pixels: Tensor
    clusters: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or self.pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 [n, 3, S, S], not {self.pixels.dtype} {shape}")
        if self.clusters.shape != shape[:1] or self.clusters.dtype != torch.int64 or shape[0] == 0:
            raise ValueError(f"{shape[0]} images, clusters {self.clusters.dtype} {tuple(self.clusters.shape)}")

    @property
    def side(self) -> int:
        return int(self.pixels.shape[2])


@dataclass(frozen=True)
class FittedDeltas:
    """The finished deltas of k clusters, in whole 8-bit levels, and what was seen while fitting them.

    clusters, targets  k cluster indices and the cluster each is moved to
    levels   int8 [k, 3, S, S]; None where every image gets a delta of its own
    losses   float32 [k, steps]; where a batch had no image of the cluster, the value before is repeated
    moved    float32 [k]: share of the cluster's own protected images whose nearest centroid is the target's,
             in the features of what delta was optimised through; nan for a cluster without images
    before   float32 [k]: the same share of the clean images
    rms      float32 [k]: root mean square of the levels, in 8-bit levels
    clamped  float32 [k]: share of the values that lie on the bound
    extra    generator weights and sigma ("<cluster>/..."), or the proxy's loss curve and accuracy ("proxy/...") and,
             where every image gets a delta of its own, the weights of the proxies ("proxies.…")
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
        """The inverse of to_bytes. Raises InputError if `data` is no such file."""
        try:
            tensors = load(data)
            extra = {n.removeprefix("extra/"): t for n, t in tensors.items() if n.startswith("extra/")}
            values: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            values |= {name: tuple(tensors[name].tolist()) for name in ("clusters", "targets")}
            values["levels"] = tensors.get("levels")
            return cls(**values, extra=extra)
        except (SafetensorError, KeyError) as error:
            raise InputError(f"not a file of fitted deltas, or cut short: {error}; delete it to refit") from None


_TENSORS = ("losses", "moved", "before", "rms", "clamped")


def merge(parts: Iterable[FittedDeltas]) -> FittedDeltas:
    """The deltas of all clusters from files of some clusters each, ordered by cluster.

    Raises ConflictError if two parts hold the same cluster.
    """
    ordered = sorted(parts, key=lambda part: part.clusters)
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


class Fit(Protocol):
    """A fit that can be stopped at any step: load(state()) in a new one goes on to bit-equal deltas."""

    @property
    def is_done(self) -> bool: ...

    @property
    def progress(self) -> float:
        """Share of the steps done, 0 ... 1."""

    def advance(self, steps: int) -> None:
        """Take at most `steps` more steps. Raises PromiseError on a loss that is not finite."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as a flat dict that safetensors can hold."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`. Raises InputError if it belongs to another fit."""

    def result(self) -> FittedDeltas:
        """The finished deltas; only when is_done."""


def checkpoint(prefix: str, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and optimiser moments of a network, on the CPU, under names that start with `prefix`."""
    tensors = {f"{prefix}/net/{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for moment, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/optimiser/{moment}/{name}"] = value
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def restore(prefix: str, state: Mapping[str, Tensor], module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """The inverse of checkpoint. Copies in place: a changed memory layout could change the last bits."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(entry(state, f"{prefix}/net/{name}", value))
    optimiser.state.clear()
    parameters = dict(module.named_parameters())
    for name, value in state.items():
        if name.startswith(f"{prefix}/optimiser/"):
            moment, _, owner = name.removeprefix(f"{prefix}/optimiser/").partition("/")
            parameter = parameters[owner]
            # Adam keeps its step count on the CPU; everything shaped like the parameter lies beside it.
            same = value.shape == parameter.shape and moment != "step"
            kept = torch.empty_like(parameter).copy_(value) if same else value.clone()
            optimiser.state[parameter][moment] = kept.detach()


def entry(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """state[name], or InputError if it is absent or has another shape than `like`."""
    found = state.get(name)
    if found is None or found.shape != like.shape:
        seen = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise InputError(f"checkpoint of another fit: {name} {seen}, expected {tuple(like.shape)}; delete it")
    return found
