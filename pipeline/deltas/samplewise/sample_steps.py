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

from pipeline.deltas.artefact import check_network
from pipeline.deltas.delta import perturb, quantise
from pipeline.deltas.samplewise.base import DeltaMaker, check_header
from pipeline.deltas.samplewise.local_bound import local_bound
from pipeline.deltas.samplewise.proxy_network import ProxyNetwork, loaded_proxy
from pipeline.deltas.samplewise.step_views import Draws, StepViews
from pipeline.deltas.sign_step import check_finite, sign_step, step_size
from pipeline.hashing import torch_rng
from pipeline.precision import autocast

_START = 0.5  # of the bound: largest random start
_NAME = "proxies"


@dataclass(frozen=True, eq=False)
class SampleGenerator:
    """Everything that makes the delta of an image: proxies, and the settings of the steps.

    side        of a delta, and of the square that an image is squeezed to, pixels
    steps       sign steps per image
    plain       views without colour changes, and deltas with three channels instead of one
    seed        of the random draws, which also depend on the sample's key
    proxies     weights of every ProxyNetwork, running statistics included, by name
    flat_share  of epsilon, where an image is flat; see local_bound
    """

    side: int
    steps: int
    plain: bool
    seed: int
    proxies: tuple[Mapping[str, NDArray[Any]], ...]
    flat_share: float = 1.0

    def header(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {name: getattr(self, name) for name in ("side", "steps", "plain", "seed", "flat_share")}

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
        made = cls(**header, proxies=tuple(proxies[number] for number in range(len(proxies))))
        check_header(made.header())
        for weights in made.proxies:
            check_network(weights, lambda: ProxyNetwork(made.num_clusters, made.side))
        return made

    @property
    def num_clusters(self) -> int:
        """How many clusters its proxies tell apart."""
        return len(self.proxies[0]["head.bias"])


class SampleSteps(DeltaMaker):
    """Runs a SampleGenerator on one device; see DeltaMaker."""

    def __init__(
        self, generator: SampleGenerator, targets: Sequence[int], epsilon: float, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(targets, epsilon, device)
        self._generator = generator
        self._proxies = [loaded_proxy(weights, len(targets), generator.side, device) for weights in generator.proxies]

    def _batch(self, images: Tensor, aims: Tensor, keys: Sequence[str]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        generator, epsilon = self._generator, self._epsilon
        draws = [self._draws(key) for key in keys]
        views = StepViews(draws, self._device)
        bound = local_bound(images, epsilon, generator.flat_share)
        start = torch.stack([draw.start for draw in draws]).to(self._device).mul_(_START * bound)
        delta = start.expand(-1, 3, -1, -1).contiguous()
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
                sign_step(delta, momentum, gradient, size, bound, not generator.plain)
                losses[:, step] = loss.detach().cpu()
        return quantise(delta, epsilon), losses.numpy()

    def _draws(self, key: str) -> Draws:
        generator = self._generator
        rng = torch_rng(generator.seed, "sample-steps", key)
        return Draws.of(generator.side, generator.steps, plain=generator.plain, rng=rng)
