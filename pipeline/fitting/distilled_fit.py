"""The fit for distilled deltas: proxies as for sample-wise ones, then the network that makes a delta in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.deltas.delta import perturb
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork, noise_for
from pipeline.deltas.samplewise.local_bound import local_bound
from pipeline.deltas.samplewise.proxy_network import frozen_proxy
from pipeline.deltas.samplewise.step_views import Draws, StepViews
from pipeline.deltas.sign_step import check_finite
from pipeline.fitting.fit import FitImages, checkpoint, entry, restore
from pipeline.fitting.fit_figures import reproducible
from pipeline.fitting.sample_fit import SampleFit
from pipeline.hashing import derive, torch_rng
from pipeline.precision import autocast
from pipeline.schedules import one_cycle
from pipeline.settings import DISTILLED_BATCH, Settings

PEAK_LR = 2e-3
WARM_UP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0
_PREFIX = "distilled"


class DistilledFit(SampleFit):
    """Proxies take turns, as in the steps: each batch is moved by the network, seen in random views, and judged by one.

    settings  uses proxies, robust_proxies, plain, permutation, epsilon, seed as for SampleFit; flat_share, and steps
              of the network
    """

    def __init__(
        self, images: FitImages, num_clusters: int, settings: Settings, device: torch.device | str = "cpu"
    ) -> None:
        settings = settings.for_images(len(images.pixels))
        super().__init__(images, num_clusters, settings, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, _PREFIX))
            network = DistilledNetwork(num_clusters, images.side, plain=settings.plain)
        self.network = network.to(self._device).to(memory_format=torch.channels_last)
        self._optimiser = torch.optim.AdamW(self.network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
        self._step = 0
        self._curves = torch.zeros(num_clusters, settings.steps)
        self._judges: list[torch.nn.Module] = []

    @property
    def is_done(self) -> bool:
        return super().is_done and self._step == self._settings.steps

    @property
    def progress(self) -> float:
        steps = sum(proxy.steps for proxy in self._proxies)
        return (super().progress * steps + self._step) / (steps + self._settings.steps)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            if not super().is_done:
                super().advance(1)
            elif self._step < self._settings.steps:
                with reproducible():
                    self._advance()

    def _advance(self) -> None:
        """One step of AdamW on the cross-entropy to the targets. Raises PromiseError for a non-finite loss."""
        settings, step, images = self._settings, self._step, self._images
        rng = torch_rng(settings.seed, _PREFIX, step)
        rows = torch.randint(len(images.pixels), (DISTILLED_BATCH,), generator=rng)
        clusters = images.clusters[rows]
        clean = (images.pixels[rows].float() / 255).to(self._device)
        aims = self.aims[1].to(self._device)[clusters.to(self._device)]
        noise = torch.stack([noise_for(images.side, rng) for _ in rows]).to(self._device)
        views = StepViews([Draws.of(images.side, 1, plain=settings.plain, rng=rng) for _ in rows], self._device)
        self.network.train()
        bound = local_bound(clean, settings.epsilon, settings.flat_share)
        delta = (self.network(clean, noise, aims) * bound).expand(-1, 3, -1, -1)
        with autocast(self._device):
            seen = views.seen(perturb(clean, delta), 0)
        loss = F.cross_entropy(self._judge(step)(seen), aims, reduction="none")
        check_finite(loss, "training the network for distilled deltas", step)
        self._optimiser.zero_grad(set_to_none=True)
        loss.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        self._optimiser.param_groups[0]["lr"] = PEAK_LR * one_cycle(step, settings.steps, WARM_UP)
        self._optimiser.step()
        self._record(loss.detach().cpu(), clusters)
        self._step += 1

    def _judge(self, step: int) -> torch.nn.Module:
        """The proxy whose turn it is; frozen copies are made once all are trained."""
        if not self._judges:
            for proxy in self._proxies:
                network = type(proxy.network)(self._num_clusters, self._images.side)
                network.load_state_dict(proxy.network.state_dict())
                self._judges.append(frozen_proxy(network, self._device))
        return self._judges[step % len(self._judges)]

    def _record(self, losses: Tensor, clusters: Tensor) -> None:
        """Mean loss of each cluster in this batch; that of the step before for those without an image in it."""
        if self._step:
            self._curves[:, self._step] = self._curves[:, self._step - 1]
        for cluster in set(clusters.tolist()):
            self._curves[cluster, self._step] = losses[clusters == cluster].mean()

    def state(self) -> dict[str, Tensor]:
        own = checkpoint(_PREFIX, self.network, self._optimiser)
        own |= {f"{_PREFIX}/step": torch.tensor([self._step]), f"{_PREFIX}/losses": self._curves.clone()}
        return super().state() | own

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._curves = entry(state, f"{_PREFIX}/losses", self._curves).clone()
        restore(_PREFIX, state, self.network, self._optimiser)
        self._step = int(state[f"{_PREFIX}/step"])

    def _losses(self, losses: Tensor, clusters: Tensor) -> Tensor:
        return self._curves

    def _generator(self) -> DistilledGenerator:
        weights = {name: value.detach().cpu().contiguous().numpy() for name, value in self.network.state_dict().items()}
        settings = self._settings
        return DistilledGenerator(self._images.side, settings.plain, settings.seed, weights, settings.flat_share)
