"""The data of a run -> one self-contained HTML page without scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from pipeline.clusters.clustering import ClusterReport
from pipeline.measures.gallery import GallerySample
from pipeline.measures.removal import RemovalCheck
from pipeline.measures.scores import PictureScore, pooled_psnr, summarise
from pipeline.records import Rejection
from pipeline.report.page import figure, find_template, plain_url

LOW_MOVED = 0.2
SHOWN_REJECTIONS = 50
_GALLERY_SIDE = 224  # larger pictures are cropped to their centre
_AMPLIFIED = 10
_HIDDEN_SETTINGS = {"input", "output", "key_file", "surrogate_weights", "protection"}  # paths and secrets
_FIGURES = {
    "max_abs_delta": "largest |delta| (levels of 255)",
    "rms": "RMS of delta (levels of 255)",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "survives_jpeg75": "share of delta left after JPEG 75",
    "survives_half_size": "share of delta left after halving",
}


@dataclass(frozen=True)
class StageRate:
    """Wall time and work of one stage; bytes are what it read or wrote, 0 if not meaningful."""

    name: str
    images: int
    seconds: float
    bytes: int = 0


@dataclass(frozen=True)
class ClusterRow:
    """One cluster: its images, its delta's target, and how well the fit went.

    moved         share of its protected images nearest to the target cluster's centroid; None = not measured
    moved_clean   the same share for its clean images
    losses        the objective over the recorded steps; empty if nothing was fitted
    """

    index: int
    images: int
    target_cluster: int | None = None
    moved: float | None = None
    moved_clean: float | None = None
    losses: tuple[float, ...] = ()

    @property
    def is_low(self) -> bool:
        """True if the delta raises the share of images at the target by less than LOW_MOVED."""
        return self.moved is not None and self.moved - (self.moved_clean or 0.0) < LOW_MOVED


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. Fields without a default are required; every other section may be absent.

    method    in plain words, e.g. "Unlearnable Clusters, deltas optimised directly through the proxy"
    """

    input_url: str
    output_url: str
    method: str
    epsilon: float
    fingerprint: str
    num_protected: int
    num_quarantined: int
    num_shards: int
    input_image_bytes: int
    output_image_bytes: int
    num_finer: int = 0  # JPEGs written with finer steps or more colour than they came with
    num_reread: int = 0  # pictures decoded again when they were written
    survival: float = 0.0  # sum of the shares of their deltas that were left
    finished: str = ""
    stages: tuple[StageRate, ...] = ()
    clusters: tuple[ClusterRow, ...] = ()
    clustering: ClusterReport | None = None
    gallery: tuple[GallerySample, ...] = ()
    removal: RemovalCheck | None = None
    scores: tuple[PictureScore, ...] = ()
    quarantine: Mapping[str, int] = field(default_factory=dict)
    rejections: tuple[Rejection, ...] = ()
    lost: tuple[str, ...] = ()  # parts of the input that were not read
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def removal_sentence(check: RemovalCheck) -> str:
    """What the removal check means, in plain words, judged by the stronger of the two adversaries."""
    blind, known = check.worst_blind, check.worst_known
    worst = max(blind, known)
    figure = f"mean correlation {blind:.2f} from the pixels alone, {known:.2f} with the clusters known"
    if worst >= 0.7:
        return (
            f"A trainer who looks for the delta can estimate it from the protected images ({figure}) and subtract it. "
            "Expect little protection against such a trainer."
        )
    if worst >= 0.3:
        return f"Averaging the protected images reveals part of the delta ({figure}), which a trainer could exploit."
    return (
        f"Averaging the protected images does not reveal the delta ({figure}). "
        "There may be other ways to find it, such as its frequencies."
    )


def write_report(data: ReportData) -> str:
    """The page as self-contained HTML; keys, names and details are escaped."""
    from pipeline.report import charts  # imports matplotlib, which takes half a second

    return find_template("report.html.j2").render(
        data=data,
        input_url=plain_url(data.input_url),
        output_url=plain_url(data.output_url),
        epsilon_levels=figure(data.epsilon * 255),
        gallery=[gallery_figures(sample) for sample in data.gallery],
        largest_cluster=max((row.images for row in data.clusters), default=1) or 1,
        low_clusters=[row for row in data.clusters if row.is_low],
        is_moved_measured=any(row.moved is not None for row in data.clusters),
        removal_sentence="" if data.removal is None else removal_sentence(data.removal),
        pooled_psnr=pooled_psnr(data.scores) if data.scores else None,
        spreads=[(_FIGURES[name], spread) for name, spread in summarise(data.scores).items()],
        rejections=data.rejections[:SHOWN_REJECTIONS],
        settings=[(name, data.settings[name]) for name in data.settings if name not in _HIDDEN_SETTINGS],
        removal_chart="" if data.removal is None else Markup(charts.removal(data.removal.known, data.removal.blind)),
        histograms=[Markup(svg) for svg in _histograms(data)],
        curves=[Markup(svg) for svg in _curves(data.clusters)],
    )


def _histograms(data: ReportData) -> list[str]:
    if not data.scores:
        return []
    from pipeline.report import charts

    bound = data.epsilon * 255
    columns = {name: [float(getattr(score, name)) for score in data.scores] for name in _FIGURES}
    psnr = [value for value in columns["psnr"] if math.isfinite(value)]
    psnr_span = (math.floor(min(psnr, default=20)) - 1.0, math.ceil(max(psnr, default=40)) + 1.0)
    ssim_span = (math.floor(10 * min([0.9, *(v for v in columns["ssim"] if math.isfinite(v))])) / 10, 1.0)
    most = max(bound, *columns["max_abs_delta"])
    spans = {
        "max_abs_delta": (0.0, math.ceil(1.25 * most)),
        "psnr": psnr_span,
        "ssim": ssim_span,
        "survives_jpeg75": (0.0, 1.2),
        "survives_half_size": (0.0, 1.2),
    }
    return [
        charts.histogram(columns[name], _FIGURES[name], span=span, mark=bound, mark_label="ε")
        if name == "max_abs_delta"
        else charts.histogram(columns[name], _FIGURES[name], span=span)
        for name, span in spans.items()
    ]


def _curves(clusters: Sequence[ClusterRow]) -> list[str]:
    from pipeline.report import charts

    fitted = [row for row in clusters if row.losses]
    span = charts.shared_span([row.losses for row in fitted])
    return [charts.training_curve(row.losses, f"cluster {row.index}", span=span, is_low=row.is_low) for row in fitted]


def gallery_figures(sample: GallerySample) -> dict[str, Any]:
    """One gallery entry: three PNGs as data URLs, and how they were cropped."""
    height, width = sample.original.shape[:2]
    top, left = max(0, (height - _GALLERY_SIDE) // 2), max(0, (width - _GALLERY_SIDE) // 2)
    window = np.s_[top : top + _GALLERY_SIDE, left : left + _GALLERY_SIDE]
    original, protected = sample.original[window], sample.protected[window]
    delta = protected.astype(np.int16) - original
    amplified = np.rint(127.5 + _AMPLIFIED * delta).clip(0, 255).astype(np.uint8)
    return {
        "key": sample.key,
        "cluster": sample.cluster,
        "width": width,
        "height": height,
        "is_cut": max(height, width) > _GALLERY_SIDE,
        "most": int(np.abs(delta).max()),
        "images": [_data_url(pixels) for pixels in (original, protected, amplified)],
    }


def _data_url(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
