"""Sample-wise deltas: sign steps move every image to the target of its cluster.

Averaging images reveals a delta that a whole cluster shares, and a spectrum reveals a texture. These deltas share only
a direction in the features of networks that know the clusters, which neither shows. The steps are targeted as in Fowl
et al. (NeurIPS 2021), but towards clusters instead of classes, through several proxies and under random views
(expectation over transformation, Athalye et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.deltas.delta import perturb, quantise
from pipeline.deltas.proxy_network import ProxyNetwork, crop_padding
from pipeline.deltas.sign_step import check_finite, sign_step, step_size
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import GREY, ColourChanges, Views, colour_changes, random_views
from pipeline.precision import autocast, dtype_of

BATCH = {"cpu": 16, "cuda": 512}  # images per batch: always exactly this many, so that results are equal to the bit
_START = 0.5  # of epsilon: bound of the random starts
_NAME = "proxies"


@dataclass(frozen=True, eq=False)
class SampleGenerator:
    """Everything that makes the delta of an image: proxies, and the settings of the steps.

    side     of a delta, and of the square that an image is squeezed to, pixels
    steps    sign steps per image
    plain    views without colour changes, and deltas with three channels instead of one
    seed     of the random draws, which also depend on the sample's key
    proxies  weights of every ProxyNetwork, running statistics included, by name
    """

    side: int
    steps: int
    plain: bool
    seed: int
    proxies: tuple[Mapping[str, NDArray[Any]], ...]

    def header(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {name: getattr(self, name) for name in ("side", "steps", "plain", "seed")}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights, named as from_parts expects."""
        return {
            f"{_NAME}.{n}.{name}": array for n, weights in enumerate(self.proxies) for name, array in weights.items()
        }

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> SampleGenerator:
        """The inverse of header and tensors. Raises KeyError, ValueError or TypeError for anything else."""
        proxies: dict[int, dict[str, NDArray[Any]]] = {}
        for name, array in tensors.items():
            if name.startswith(f"{_NAME}."):
                number, _, parameter = name.removeprefix(f"{_NAME}.").partition(".")
                proxies.setdefault(int(number), {})[parameter] = array
        if not proxies or sorted(proxies) != list(range(len(proxies))):
            raise ValueError(f"proxies {sorted(proxies)}")
        return cls(**header, proxies=tuple(proxies[number] for number in range(len(proxies))))


@dataclass(frozen=True)
class _Draws:
    """All random draws of an image, made before its first step; they depend on its key, not on the rest of the batch.

    start     float [channels, S, S] in -1 ... 1
    views     a crop and flip for every step
    colours   colour changes for every step
    coloured  bool [steps]: whether the colour changes are used
    smooth    int64 [steps]: 0 unchanged, 1 mean over 3 pixels, 2 half the size and back
    """

    start: Tensor
    views: Views
    colours: ColourChanges
    coloured: Tensor
    smooth: Tensor

    @classmethod
    def of(cls, generator: SampleGenerator, key: str) -> _Draws:
        side, steps = generator.side, generator.steps
        rng = torch_rng(generator.seed, "sample-steps", key)
        start = 2 * torch.rand(3 if generator.plain else 1, side, side, generator=rng) - 1
        views = random_views(steps, side, side, crop_padding(side), rng)
        colours = colour_changes(steps, rng)
        coloured = (torch.rand(steps, generator=rng) < 0.5) & torch.tensor(not generator.plain)
        return cls(start, views, colours, coloured, torch.randint(3, (steps,), generator=rng))


class SampleSteps:
    """Runs a SampleGenerator on one device.

    targets  the target cluster of each cluster
    epsilon  bound on |delta|, pixel units
    """

    def __init__(
        self, generator: SampleGenerator, targets: Sequence[int], epsilon: float, device: torch.device | str = "cpu"
    ) -> None:
        self._generator, self._epsilon, self._device = generator, epsilon, torch.device(device)
        self._targets = torch.tensor(targets, device=device)
        self._proxies = [self._loaded(weights) for weights in generator.proxies]

    def _loaded(self, weights: Mapping[str, NDArray[Any]]) -> ProxyNetwork:
        network = ProxyNetwork(len(self._targets), self._generator.side)
        network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
        network.eval().requires_grad_(False).fuse()
        network.body.to(dtype_of(self._device))  # else autocast would convert the weights at every step
        return network.to(self._device).to(memory_format=torch.channels_last)

    def levels(
        self, squares: NDArray[np.uint8], clusters: Sequence[int], keys: Sequence[str]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Whole 8-bit levels int8 [n, 3, S, S] within epsilon, and the loss at every step float32 [n, steps].

        squares  uint8 [n, S, S, 3]
        A row depends only on its own square, cluster and key, to the bit, because batches always have the same size.
        Raises PromiseError if a loss is not finite.
        """
        batch = BATCH[self._device.type]
        batches = []
        for at in range(0, len(squares), batch):
            real = squares[at : at + batch]
            missing = batch - len(real)
            padded = np.concatenate([real, np.repeat(real[-1:], missing, axis=0)])
            padded_clusters, padded_keys = [*clusters[at : at + batch]], [*keys[at : at + batch]]
            made = self._batch(
                padded, padded_clusters + padded_clusters[-1:] * missing, padded_keys + padded_keys[-1:] * missing
            )
            batches.append([part[: len(real)] for part in made])
        return np.concatenate([levels for levels, _ in batches]), np.concatenate([losses for _, losses in batches])

    def _batch(
        self, squares: NDArray[np.uint8], clusters: Sequence[int], keys: Sequence[str]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        generator, epsilon = self._generator, self._epsilon
        images = torch.from_numpy(squares).to(self._device).permute(0, 3, 1, 2).float().div_(255)
        aims = self._targets[torch.tensor(clusters, device=self._device)]
        draws = [_Draws.of(generator, key) for key in keys]
        views = _Views(draws, self._device)
        delta = torch.stack([draw.start for draw in draws]).mul_(_START * epsilon).expand(-1, 3, -1, -1)
        delta = delta.contiguous().to(self._device)
        momentum, losses = torch.zeros_like(delta), torch.zeros(len(images), generator.steps)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for step in range(generator.steps):
                delta.requires_grad_()
                with autocast(self._device):
                    seen = views.seen(perturb(images, delta), step)
                proxy = self._proxies[step % len(self._proxies)]
                loss = F.cross_entropy(proxy(seen), aims, reduction="none")
                (gradient,) = torch.autograd.grad(loss.sum(), delta)
                check_finite(loss, "making deltas for single images", step)
                delta = delta.detach()
                size = step_size(step, generator.steps, epsilon)
                sign_step(delta, momentum, gradient, size, epsilon, not generator.plain)
                losses[:, step] = loss.detach().cpu()
        return quantise(delta, epsilon), losses.numpy()


class _Views:
    """A batch's views at each step, as matrices: crop, flip, smoothing over rows and columns; colour over channels."""

    def __init__(self, draws: Sequence[_Draws], device: torch.device) -> None:
        self._rows, self._columns = (
            torch.stack([getattr(draw.views, name) for draw in draws], 1).to(device) for name in ("rows", "columns")
        )
        self._smooth = torch.stack([draw.smooth for draw in draws], 1).to(device)
        coloured = torch.stack([draw.coloured for draw in draws], 1)
        mix, turn = (torch.stack([getattr(draw.colours, name) for draw in draws], 1) for name in ("mix", "turn"))
        mix = torch.where(coloured[..., None, None], mix, torch.eye(3))
        turn = torch.where(coloured, turn, torch.zeros(()))
        # the added colour is a fraction of the image's mean grey, equal in all channels
        self._mix, self._turn = mix.to(device), turn.to(device)
        self._smoothers = _smoothers(self._rows.shape[2]).to(device)
        self._grey = torch.tensor(GREY, device=device)

    def seen(self, images: Tensor, step: int) -> Tensor:
        """Images float [B, 3, S, S] as a trainer might see them, each with its own draws; differentiable."""
        side = images.shape[2]
        smoothers = self._smoothers[self._smooth[step]]
        rows, columns = (
            (smoothers @ F.one_hot(index[step], side).float())[:, None] for index in (self._rows, self._columns)
        )
        seen = rows @ images @ columns.transpose(2, 3)
        grey = (seen.mean((2, 3)) @ self._grey) * self._turn[step]
        mixed = self._mix[step] @ seen.flatten(2) + grey[:, None, None]
        return F.hardtanh(mixed, 0.0, 1.0).reshape(seen.shape)


def _smoothers(side: int) -> Tensor:
    """float [3, S, S]: matrices that leave a row unchanged, average over 3 pixels, or halve its size and restore it."""
    at = torch.arange(side)
    near = ((at[:, None] - at).abs() <= 1).float()
    halves = (at[:, None] // 2 == at // 2).float()
    return torch.stack([weights / weights.sum(1, keepdim=True) for weights in (torch.eye(side), near, halves)])
