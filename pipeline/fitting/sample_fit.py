"""The fit for sample-wise deltas: proxies trained on the clusters from different starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pipeline.clusters.clustering import target_clusters
from pipeline.deltas.delta import levels_of
from pipeline.deltas.samplewise.kinds import PictureGenerator, maker_of
from pipeline.deltas.samplewise.sample_steps import SampleGenerator
from pipeline.fitting.fit import FitImages, FittedDeltas
from pipeline.fitting.fit_figures import embed_all, moved_shares, reproducible
from pipeline.fitting.objective import feature_means
from pipeline.fitting.proxy_training import ProxyTraining
from pipeline.hashing import derive, torch_rng
from pipeline.settings import Settings

ROBUST = 0.25  # times epsilon: radius of a robust proxy's adversarial examples; 4/255 for epsilon 16/255
TRIED_IMAGES = 256  # images that deltas are made for, to measure how far they move


class SampleFit:
    """Trains the proxies one after the other; deltas are made later, for each image.

    images    all clusters' images, at the side of the deltas
    settings  uses proxies, robust_proxies (the last ones), steps, plain, permutation, epsilon, flat_share, seed
    Target clusters are chosen from the first proxy's mean feature of each cluster.
    """

    def __init__(
        self, images: FitImages, num_clusters: int, settings: Settings, device: torch.device | str = "cpu"
    ) -> None:
        self._images, self._num_clusters, self._settings = images, num_clusters, settings
        self._device = torch.device(device)
        self._proxies = [
            ProxyTraining(
                images,
                num_clusters,
                colour_robust=not settings.plain,
                seed=derive(settings.seed, "sample-proxy", number),
                device=self._device,
                least_steps=settings.proxy_steps,
                radius=0.0 if number < settings.proxies - settings.robust_proxies else ROBUST * settings.epsilon,
            )
            for number in range(settings.proxies)
        ]

    @property
    def is_done(self) -> bool:
        return all(proxy.is_done for proxy in self._proxies)

    @property
    def progress(self) -> float:
        return sum(proxy.step for proxy in self._proxies) / sum(proxy.steps for proxy in self._proxies)

    def advance(self, steps: int) -> None:
        with reproducible():
            for _ in range(steps):
                left = next((proxy for proxy in self._proxies if not proxy.is_done), None)
                if left is None:
                    return
                left.advance()

    def state(self) -> dict[str, Tensor]:
        return {
            f"{number}/{name}": value
            for number, proxy in enumerate(self._proxies)
            for name, value in proxy.state().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for number, proxy in enumerate(self._proxies):
            start = f"{number}/"
            proxy.load({name.removeprefix(start): value for name, value in state.items() if name.startswith(start)})

    def result(self) -> FittedDeltas:
        assert self.is_done, "the fit is not finished"
        settings, first, num_clusters = self._settings, self._proxies[0], self._num_clusters
        tried = _tried(self._images.clusters, num_clusters, settings.seed)
        pixels, clusters = self._images.pixels[tried], self._images.clusters[tried]
        with reproducible():
            centroids, targets, accuracies = self.aims
            generator = self._generator()
            maker = maker_of(generator, targets.tolist(), settings.epsilon, self._device)
            levels, losses = maker.levels_and_losses(
                pixels.permute(0, 2, 3, 1).contiguous().numpy(), clusters.tolist(), [str(int(row)) for row in tried]
            )
            changed = torch.from_numpy(levels).to(torch.int16)
            shares = [
                moved_shares(
                    embed_all(first.features, images.to(self._device), None, clusters),
                    centroids,
                    targets.to(self._device),
                    clusters.to(self._device),
                )
                for images in ((pixels + changed).clamp(0, 255).to(torch.uint8), pixels)
            ]
        size = changed.float().flatten(1)
        clamped = (size.abs() >= levels_of(settings.epsilon)).float()
        return FittedDeltas(
            clusters=tuple(range(num_clusters)),
            targets=tuple(targets.tolist()),
            levels=None,
            losses=self._losses(torch.from_numpy(losses), clusters),
            moved=shares[0],
            before=shares[1],
            rms=feature_means(size.square().mean(1, keepdim=True), clusters, num_clusters).sqrt()[:, 0],
            clamped=feature_means(clamped.mean(1, keepdim=True), clusters, num_clusters)[:, 0],
            extra={
                "proxy/losses": torch.stack([proxy.losses for proxy in self._proxies]).mean(0),
                "proxy/accuracy": torch.tensor(accuracies),
                "sample/side": torch.tensor([self._images.side]),
                **{name: torch.from_numpy(array) for name, array in generator.tensors().items()},
            },
        )

    @cached_property
    def aims(self) -> tuple[Tensor, Tensor, list[float]]:
        """Mean feature of each cluster in the first proxy, target clusters, the accuracy of every proxy."""
        pixels, clusters = (images.to(self._device) for images in (self._images.pixels, self._images.clusters))
        features = [embed_all(proxy.features, pixels, None, clusters) for proxy in self._proxies]
        accuracies = [proxy.accuracy(each) for proxy, each in zip(self._proxies, features, strict=True)]
        centroids = feature_means(features[0], clusters, self._num_clusters)
        targets = torch.as_tensor(target_clusters(centroids.cpu().numpy(), self._settings.permutation))
        return centroids, targets, accuracies

    def _losses(self, losses: Tensor, clusters: Tensor) -> Tensor:
        """Loss curve of each cluster [k, steps], from those of the tried images [n, steps]."""
        return feature_means(losses, clusters, self._num_clusters)

    def _generator(self) -> PictureGenerator:
        weights = tuple(
            {name: value.detach().cpu().contiguous().numpy() for name, value in proxy.network.state_dict().items()}
            for proxy in self._proxies
        )
        settings = self._settings
        return SampleGenerator(
            self._images.side, settings.steps, settings.plain, settings.seed, weights, settings.flat_share
        )


def _tried(clusters: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Rows of about TRIED_IMAGES images, equally many per cluster where possible."""
    order = torch.randperm(len(clusters), generator=torch_rng(seed, "tried-images"))
    each = math.ceil(TRIED_IMAGES / num_clusters)
    return torch.cat([order[clusters[order] == cluster][:each] for cluster in range(num_clusters)])
