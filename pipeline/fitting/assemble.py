"""Build a protection from fitted deltas or a secret key and a clustering; store clusterings as files."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from pipeline.clusters.clustering import Clustering, target_clusters
from pipeline.deltas.protection import Protection
from pipeline.deltas.samplewise.kinds import PER_PICTURE, PictureGenerator, generator_from
from pipeline.deltas.textures import check_key
from pipeline.errors import InputError
from pipeline.fitting.fit import FittedDeltas
from pipeline.settings import Settings

_CURVE_POINTS = 100
_LICENCE = (
    "fitted on the collection's own images with the surrogate named here: the terms of both apply to this file; "
    "the weights of the surrogate are not in it"
)


def clustering_to_bytes(clustering: Clustering) -> bytes:
    """One safetensors file; equal clusterings give equal bytes."""
    return save({name: np.ascontiguousarray(array) for name, array in clustering.to_tensors().items()})


def clustering_from_bytes(data: bytes) -> Clustering:
    """The inverse of clustering_to_bytes. Raises InputError if `data` is not such a file."""
    try:
        return Clustering.from_tensors(load(data))
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"not a clustering, or truncated: {error}; delete the file to cluster again") from None


def fitted_protection(
    fitted: FittedDeltas, clustering: Clustering, settings: Settings, surrogate_id: str, fingerprint: str
) -> Protection:
    """The protection of a run, from the deltas of all its clusters or from the networks that make one per image."""
    return Protection(
        method=settings.method,
        generator=settings.generator,
        surrogate_id=surrogate_id,
        epsilon=settings.epsilon,
        clustering=clustering,
        targets=fitted.targets,
        levels=None if fitted.levels is None else fitted.levels.numpy(),
        fingerprint=fingerprint,
        licence=_LICENCE,
        size=settings.size,
        figures=_figures(fitted),
        sample=_picture_generator(fitted, settings) if settings.generator in PER_PICTURE else None,
    )


def _picture_generator(fitted: FittedDeltas, settings: Settings) -> PictureGenerator:
    header: dict[str, Any] = {name: getattr(settings, name) for name in ("plain", "seed", "flat_share")}
    header["side"] = int(fitted.extra["sample/side"])
    if settings.generator == "sample":
        header["steps"] = settings.steps
    weights = {name: value.numpy() for name, value in fitted.extra.items()}
    return generator_from(settings.generator, header, weights)


def texture_protection(
    clustering: Clustering, settings: Settings, surrogate_id: str, fingerprint: str, key: bytes
) -> Protection:
    """A protection by keyed random textures: only the clusters are fitted."""
    targets = target_clusters(clustering.centroids, settings.permutation)
    return Protection(
        method=settings.method,
        generator=settings.generator,
        surrogate_id=surrogate_id,
        epsilon=settings.epsilon,
        clustering=clustering,
        targets=tuple(targets.tolist()),
        levels=None,
        fingerprint=fingerprint,
        key_sha256=check_key(key),
        licence=_LICENCE,
        size=settings.size,
    )


def _figures(fitted: FittedDeltas) -> dict[str, Any]:
    """Figures recorded during the fit, as JSON: a number or a curve of at most 100 points per cluster."""
    figures: dict[str, Any] = {
        name: [_number(value) for value in getattr(fitted, name).tolist()]
        for name in ("moved", "before", "rms", "clamped")
    }
    figures["losses"] = [_curve(row) for row in fitted.losses]
    for name, values in fitted.extra.items():
        if name.startswith("proxy/"):
            figures[name.replace("/", "_")] = _curve(values)
    return figures


def _curve(values: Tensor) -> list[float | None]:
    """At most 100 points, each the mean of an equal stretch."""
    parts = np.array_split(values.double().numpy().ravel(), min(_CURVE_POINTS, values.numel()))
    return [_number(float(part.mean())) for part in parts]


def _number(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
