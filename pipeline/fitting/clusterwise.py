"""Unlearnable Clusters (Zhang et al., CVPR 2023): fits of cluster-wise deltas.

ProxyFit    all deltas jointly, through a proxy network that it first trains on the cluster ids
ClusterFit  one cluster's delta through the pretrained surrogate, as in the paper
Both implement pipeline.fitting.fit.Fit and derive every random number from (seed, purpose, index).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.clusters.clustering import target_clusters
from pipeline.deltas.delta import levels_of, perturb, quantise
from pipeline.deltas.generators import DirectDelta, NetworkDelta
from pipeline.deltas.sign_steps import check_finite, sign_step, step_size
from pipeline.errors import SettingsError
from pipeline.fingerprint import torch_rng
from pipeline.fitting.fit import FitImages, FittedDeltas, checkpoint, entry, restore
from pipeline.fitting.fit_figures import embed_all, moved_shares, reproducible
from pipeline.fitting.objective import distances, feature_means, sum_by_cluster
from pipeline.fitting.proxy import ProxyTraining, augmented
from pipeline.pictures.augment import colour_jitter, random_views, take
from pipeline.schedules import cosine
from pipeline.settings import Settings

GENERATOR_LR = 1e-4
LEAST_LR = 1e-6
GENERATOR_WEIGHT_DECAY = 5e-4  # coupled, inside Adam, as in the authors' code
_EVALUATION_BATCH = 256


class FeatureNetwork(Protocol):
    """What a fit needs from a surrogate: differentiable features of images, float [B, 3, S, S] in [0, 1]."""

    def embed(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """Features [B, d]; `resize` brings the images to the surrogate's input size."""


class ProxyFit:
    """Trains the proxy, then optimises all clusters' deltas at once, by sign steps on its features.

    images    all clusters' images, at the side of the deltas
    settings  uses permutation, distance, epsilon, steps, batch_size, plain, seed, step_size
    Without `plain`, the proxy is trained and deltas are fitted under colour jitter, and each delta is equal in all
    channels. Target clusters are chosen from the proxy's mean feature of each cluster.
    """

    def __init__(
        self, images: FitImages, num_clusters: int, settings: Settings, device: torch.device | str = "cpu"
    ) -> None:
        self._settings, self._device = settings, torch.device(device)
        self._pixels, self._clusters = images.pixels.to(device), images.clusters.to(device)
        self._num_clusters = num_clusters
        self._colour_robust = not settings.plain
        self._proxy = ProxyTraining(
            images, num_clusters, colour_robust=self._colour_robust, seed=settings.seed, device=self._device
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
        return _fitted(
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


class ClusterFit:
    """Fits one cluster's delta through the surrogate, as a generator network or directly.

    images         of all clusters, at the side of the delta or larger; larger ones are randomly cropped while fitting
                   and centre-cropped for the final figures
    feature_means  float [p, d], in the surrogate's feature space
    targets        int [p]
    settings       uses generator, bound, distance, epsilon, train_images, steps, batch_size, generator_lr, step_size,
                   seed
    side           of the delta in pixels; None = that of the images
    width          of the generator network; default as in the paper
    blocks         of the generator network; default as in the paper

    network  Adam 1e-4, coupled weight decay 5e-4, cosine per step to 1e-6; the clean image is cropped and flipped, the
             delta never is (as in the authors' code)
    direct   sign steps; image and delta are cropped and flipped together, so that the delta survives both
    Raises SettingsError if the cluster has no images of its own and train_images is `cluster`.
    """

    def __init__(
        self,
        cluster: int,
        images: FitImages,
        surrogate: FeatureNetwork,
        feature_means: Tensor,
        targets: Sequence[int] | Tensor,
        settings: Settings,
        device: torch.device | str = "cpu",
        *,
        side: int | None = None,
        width: int = 64,
        blocks: int = 6,
    ) -> None:
        self._cluster, self._settings, self._device = cluster, settings, torch.device(device)
        self._surrogate, self._side = surrogate, side or images.side
        self._centroids = feature_means.float().to(device)
        self._target = int(targets[cluster])
        own = images.clusters == cluster
        self._own = images.pixels[own].to(device)
        self._pixels = self._own if settings.train_images == "cluster" else images.pixels.to(device)
        if len(self._pixels) == 0:
            raise SettingsError(f"cluster {cluster} has no images to fit on; use --train-images all")
        epsilon, seed = settings.epsilon, settings.seed
        self._is_network = settings.generator == "network"
        self._generator: NetworkDelta | DirectDelta
        if self._is_network:
            self._generator = NetworkDelta(
                self._side, epsilon, settings.bound, seed=seed, cluster=cluster, width=width, blocks=blocks
            )
        else:
            self._generator = DirectDelta(1, self._side, epsilon, seed=seed, index=cluster)
        self._generator.to(device)
        self._optimiser = torch.optim.Adam(self._generator.parameters(), weight_decay=GENERATOR_WEIGHT_DECAY)
        self._momentum = torch.zeros(1, 3, self._side, self._side, device=device)
        self._losses = torch.zeros(1, settings.steps)
        self._step = 0

    @property
    def is_done(self) -> bool:
        return self._step == self._settings.steps

    @property
    def progress(self) -> float:
        return self._step / self._settings.steps

    def advance(self, steps: int) -> None:
        with reproducible():
            for _ in range(min(steps, self._settings.steps - self._step)):
                self._one_step()

    def _one_step(self) -> None:
        settings, rng = self._settings, torch_rng(self._settings.seed, "cluster-step", self._cluster, self._step)
        clean = self._pixels[self._batch().to(self._device)]
        views = random_views(len(clean), clean.shape[2], self._side, 0, rng)
        clean = take(clean, views).float() / 255
        delta = self._delta()
        seen = perturb(clean, delta)
        if not self._is_network:
            seen = augmented(seen, rng)
        loss = self._distances(seen).mean()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        check_finite(loss, f"fitting cluster {self._cluster}", self._step)
        if self._is_network:
            self._optimiser.param_groups[0]["lr"] = _cosine_lr(self._step, settings.steps, settings.generator_lr)
            self._optimiser.step()
        else:
            self._sign_step()
        self._losses[0, self._step] = loss.detach()
        self._step += 1

    def _sign_step(self) -> None:
        assert isinstance(self._generator, DirectDelta)
        settings, parameter = self._settings, self._generator.delta
        assert parameter.grad is not None
        size = step_size(self._step, settings.steps, settings.epsilon, settings.step_size)
        with torch.no_grad():
            sign_step(parameter, self._momentum, parameter.grad, size, settings.epsilon, one_channel=False)

    def _batch(self) -> Tensor:
        """Indices of this step's images; epochs are shuffled, and their last batch may be smaller."""
        settings, count = self._settings, len(self._pixels)
        epoch, batch = divmod(self._step, math.ceil(count / settings.batch_size))
        order = torch.randperm(count, generator=torch_rng(settings.seed, "order", self._cluster, epoch))
        return order[batch * settings.batch_size : (batch + 1) * settings.batch_size]

    def _delta(self) -> Tensor:
        """[3, side, side], differentiable."""
        delta: Tensor = self._generator()
        return delta if self._is_network else delta[0]

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            features = self._surrogate.embed(images, resize=True)
        return features.float()

    def _distances(self, images: Tensor) -> Tensor:
        features = self._features(images)
        return distances(features, self._centroids[self._target].expand_as(features), self._settings.distance)

    def state(self) -> dict[str, Tensor]:
        return checkpoint("generator", self._generator, self._optimiser) | {
            "momentum": self._momentum.cpu().clone(),
            "losses": self._losses.clone(),
            "step": torch.tensor([self._step]),
            "cluster": torch.tensor([self._cluster]),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, own in (("momentum", self._momentum), ("losses", self._losses)):
            own.copy_(entry(state, name, own))
        restore("generator", state, self._generator, self._optimiser)
        self._step = int(state["step"])

    def result(self) -> FittedDeltas:
        assert self.is_done, "the fit is not finished"
        targets = torch.full((self._centroids.shape[0],), self._target, device=self._device)
        clusters = torch.zeros(len(self._own), dtype=torch.int64, device=self._device)
        edge = (self._own.shape[2] - self._side) // 2
        own = self._own[:, :, edge : edge + self._side, edge : edge + self._side]
        with torch.no_grad(), reproducible():
            levels = torch.from_numpy(quantise(self._delta()[None].cpu(), self._settings.epsilon))
            shares = [
                moved_shares(embed_all(self._features, own, added, clusters), self._centroids, targets, clusters)[:1]
                for added in (levels, None)
            ]
        extra = {
            f"{self._cluster}/{name}": value.detach().cpu().clone()
            for name, value in self._generator.state_dict().items()
            if self._is_network
        }
        return _fitted((self._cluster,), (self._target,), levels, self._losses, shares, self._settings.epsilon, extra)


def _fitted(
    clusters: Sequence[int],
    targets: Sequence[int],
    levels: Tensor,
    losses: Tensor,
    shares: Sequence[Tensor],
    epsilon: float,
    extra: Mapping[str, Tensor],
) -> FittedDeltas:
    values = levels.float()
    return FittedDeltas(
        clusters=tuple(clusters),
        targets=tuple(targets),
        levels=levels,
        losses=losses.clone(),
        moved=shares[0],
        before=shares[1],
        rms=values.square().mean((1, 2, 3)).sqrt(),
        clamped=(values.abs() >= levels_of(epsilon)).float().mean((1, 2, 3)),
        extra=extra,
    )


def _draw(count: int, batch_size: int, rng: torch.Generator) -> Tensor:
    """Indices of a batch, drawn without replacement if there are enough images."""
    if count >= batch_size:
        return torch.randperm(count, generator=rng)[:batch_size]
    return torch.randint(count, (batch_size,), generator=rng)


def _cosine_lr(step: int, steps: int, peak: float | None) -> float:
    top = GENERATOR_LR if peak is None else peak
    return LEAST_LR + (top - LEAST_LR) * cosine(step, steps)
