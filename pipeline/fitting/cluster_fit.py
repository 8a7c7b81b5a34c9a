"""Unlearnable Clusters (Zhang et al., CVPR 2023) as published: one cluster's delta through the pretrained surrogate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.deltas.delta import perturb, quantise
from pipeline.deltas.generators import DirectDelta, NetworkDelta
from pipeline.deltas.sign_step import check_finite, sign_step, step_size
from pipeline.errors import InputError, SettingsError
from pipeline.fitting.fit import FitImages, FittedDeltas, checkpoint, entry, restore
from pipeline.fitting.fit_figures import embed_all, moved_shares, reproducible, with_figures
from pipeline.fitting.objective import distances
from pipeline.fitting.proxy_training import augmented
from pipeline.hashing import torch_rng
from pipeline.pictures.augment import random_views, take
from pipeline.schedules import cosine
from pipeline.settings import Settings

GENERATOR_LR = 1e-4
LEAST_LR = 1e-6
GENERATOR_WEIGHT_DECAY = 5e-4  # coupled, inside Adam, as in the authors' code


class FeatureNetwork(Protocol):
    """What a fit needs from a surrogate: differentiable features of images, float [B, 3, S, S] in [0, 1]."""

    def embed(self, images: Tensor, *, resize: bool = False) -> Tensor:
        """Features [B, d]; `resize` brings the images to the surrogate's input size."""


@dataclass(frozen=True)
class Aims:
    """Where the clusters are, and where their images are moved.

    feature_means  float [p, d]: mean feature of each cluster, in the surrogate's feature space
    targets        target cluster of each cluster
    """

    feature_means: Tensor
    targets: Sequence[int]


@dataclass(frozen=True)
class NetworkShape:
    """Size of a generator network; the paper's by default."""

    width: int = 64
    blocks: int = 6


class ClusterFit:
    """Fits one cluster's delta through the surrogate, as a generator network or directly.

    images    of all clusters, at the side of the delta or larger; larger ones are randomly cropped while fitting and
              centre-cropped for the final figures
    aims      of all clusters
    settings  uses generator, bound, distance, epsilon, train_images, steps or epochs,
              batch_size, generator_lr, step_size, seed
    side      of the delta in pixels; None = that of the images
    shape     of the generator network

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
        aims: Aims,
        settings: Settings,
        device: torch.device | str = "cpu",
        *,
        side: int | None = None,
        shape: NetworkShape = NetworkShape(),  # noqa: B008  frozen
    ) -> None:
        self._cluster, self._device = cluster, torch.device(device)
        self._surrogate, self._side = surrogate, side or images.side
        self._centroids = aims.feature_means.float().to(device)
        self._target = int(aims.targets[cluster])
        own = images.clusters == cluster
        self._own = images.pixels[own].to(device)
        self._pixels = self._own if settings.train_images == "cluster" else images.pixels.to(device)
        if len(self._pixels) == 0:
            raise SettingsError(f"cluster {cluster} has no images to fit on; use --train-images all")
        self._settings = settings = settings.for_images(len(self._pixels))
        epsilon, seed = settings.epsilon, settings.seed
        self._is_network = settings.generator == "network"
        self._generator: NetworkDelta | DirectDelta
        if self._is_network:
            self._generator = NetworkDelta(
                self._side, epsilon, settings.bound, seed=seed, cluster=cluster, width=shape.width, blocks=shape.blocks
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
        if int(entry(state, "cluster", torch.tensor([self._cluster]))) != self._cluster:
            raise InputError(f"checkpoint of another fit: not of cluster {self._cluster}; delete it")
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
        return with_figures(
            (self._cluster,), (self._target,), levels, self._losses, shares, self._settings.epsilon, extra
        )


def _cosine_lr(step: int, steps: int, peak: float | None) -> float:
    top = GENERATOR_LR if peak is None else peak
    return LEAST_LR + (top - LEAST_LR) * cosine(step, steps)
