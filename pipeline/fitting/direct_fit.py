"""Unlearnable Clusters (Zhang et al., CVPR 2023): all deltas jointly, through a proxy trained on the cluster ids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.clusters.clustering import target_clusters
from pipeline.deltas.delta import perturb, quantise
from pipeline.deltas.generators import DirectDelta
from pipeline.deltas.sign_step import check_finite, sign_step, step_size
from pipeline.fitting.fit import FitImages, FittedDeltas, entry
from pipeline.fitting.fit_figures import embed_all, moved_shares, reproducible, with_figures
from pipeline.fitting.objective import distances, feature_means, sum_by_cluster
from pipeline.fitting.proxy_training import ProxyTraining, augmented
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import colour_jitter
from pipeline.settings import Settings


class ProxyFit:
    """Trains the proxy, then optimises all clusters' deltas at once, by sign steps on its features.

    images    all clusters' images, at the side of the deltas
    settings  uses permutation, distance, epsilon, steps, proxy_steps, batch_size, plain, seed, step_size
    Without `plain`, the proxy is trained and deltas are fitted under colour jitter, and each delta is equal in all
    channels. Target clusters are chosen from the proxy's mean feature of each cluster.
    """

    def __init__(
        self, images: FitImages, num_clusters: int, settings: Settings, device: torch.device | str = "cpu"
    ) -> None:
        settings = settings.for_images(len(images.pixels))
        self._settings, self._device = settings, torch.device(device)
        self._pixels, self._clusters = images.pixels.to(device), images.clusters.to(device)
        self._num_clusters = num_clusters
        self._colour_robust = not settings.plain
        self._proxy = ProxyTraining(
            images,
            num_clusters,
            colour_robust=self._colour_robust,
            seed=settings.seed,
            device=self._device,
            least_steps=settings.proxy_steps,
        )
        start = DirectDelta(
            num_clusters,
            images.side,
            settings.epsilon,
            seed=settings.seed,
            one_channel=self._colour_robust,
        )
        self._delta = start().detach().to(device)
        self._momentum = torch.zeros_like(self._delta)
        self._losses = torch.zeros(num_clusters, settings.steps)
        self._step = 0
        self._aims: tuple[Tensor, Tensor] | None = None  # proxy centroids [p, d], targets [p]

    @property
    def is_done(self) -> bool:
        return self._proxy.is_done and self._step == self._settings.steps

    @property
    def progress(self) -> float:
        return (self._proxy.step + self._step) / (self._proxy.steps + self._settings.steps)

    def advance(self, steps: int) -> None:
        with reproducible():
            for _ in range(steps):
                if self.is_done:
                    return
                if self._proxy.is_done:
                    self._delta_step()
                else:
                    self._proxy.advance()

    def _delta_step(self) -> None:
        settings, step = self._settings, self._step
        centroids, targets = self._aim()
        rng = torch_rng(settings.seed, "delta-step", step)
        chosen = _draw(len(self._pixels), settings.batch_size, rng).to(self._device)
        clusters = self._clusters[chosen]
        deltas = self._delta[clusters].requires_grad_()
        seen = augmented(perturb(self._pixels[chosen].float() / 255, deltas), rng)
        if self._colour_robust:
            half = len(seen) // 2
            seen = torch.cat([colour_jitter(seen[:half], rng), seen[half:]])
        losses = distances(self._proxy.features(seen), centroids[targets[clusters]], settings.distance)
        (gradients,) = torch.autograd.grad(losses.mean(), deltas)
        check_finite(losses, "fitting through the proxy", step)
        sign_step(
            self._delta,
            self._momentum,
            sum_by_cluster(gradients, clusters, self._num_clusters),
            step_size(step, settings.steps, settings.epsilon, settings.step_size),
            settings.epsilon,
            self._colour_robust,
        )
        self._note(losses.detach(), clusters)
        self._step += 1

    def _note(self, losses: Tensor, clusters: Tensor) -> None:
        sums = sum_by_cluster(losses[:, None], clusters, self._num_clusters)[:, 0].cpu()
        counts = torch.bincount(clusters, minlength=self._num_clusters).cpu()
        before = self._losses[:, self._step - 1] if self._step else losses.mean().cpu().expand(len(sums))
        self._losses[:, self._step] = torch.where(counts > 0, sums / counts.clamp_min(1), before)

    def _aim(self) -> tuple[Tensor, Tensor]:
        if self._aims is None:
            centroids = feature_means(self._embed(None), self._clusters, self._num_clusters)
            settings = self._settings
            targets = target_clusters(centroids.cpu().numpy(), settings.permutation)
            self._aims = centroids, torch.as_tensor(targets, dtype=torch.int64).to(self._device)
        return self._aims

    def _embed(self, levels: Tensor | None) -> Tensor:
        """Proxy features of all images, clean or with their cluster's final delta."""
        return embed_all(self._proxy.features, self._pixels, levels, self._clusters)

    def state(self) -> dict[str, Tensor]:
        return self._proxy.state() | {
            "delta": self._delta.cpu().clone(),
            "momentum": self._momentum.cpu().clone(),
            "losses": self._losses.clone(),
            "step": torch.tensor([self._step]),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, own in (("delta", self._delta), ("momentum", self._momentum), ("losses", self._losses)):
            own.copy_(entry(state, name, own))
        self._proxy.load(state)
        self._step, self._aims = int(state["step"]), None

    def result(self) -> FittedDeltas:
        assert self.is_done, "the fit is not finished"
        with reproducible():
            levels = torch.from_numpy(quantise(self._delta.cpu(), self._settings.epsilon))
            centroids, targets = self._aim()
            clean = self._embed(None)
            shares = [
                moved_shares(features, centroids, targets, self._clusters) for features in (self._embed(levels), clean)
            ]
        return with_figures(
            range(self._num_clusters),
            targets.tolist(),
            levels,
            self._losses,
            shares,
            self._settings.epsilon,
            {
                "proxy/losses": self._proxy.losses,
                "proxy/accuracy": torch.tensor([self._proxy.accuracy(clean)]),
            },
        )


def _draw(count: int, batch_size: int, rng: torch.Generator) -> Tensor:
    """Indices of a batch, drawn without replacement if there are enough images."""
    if count >= batch_size:
        return torch.randperm(count, generator=rng)[:batch_size]
    return torch.randint(count, (batch_size,), generator=rng)
