"""The report of a trained universal generator: curves, cosines, pictures (Chen et al. 2024, Fig. 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from pipeline.deltas.picture_deltas import DeltaRequest
from pipeline.deltas.universal.deltas import UniversalDeltas
from pipeline.deltas.universal.protection import UniversalProtection
from pipeline.errors import SampleError
from pipeline.measures.gallery import GallerySample
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.pictures.members import image_suffix
from pipeline.pictures.picture import decode_rgb
from pipeline.records import Rejection, Sample
from pipeline.report.charts import CLEAN, PROTECTED, STYLE, as_svg, panel
from pipeline.report.page import find_template
from pipeline.report.report_page import gallery_figures
from pipeline.surrogates.surrogate import Surrogate

SHOWN_PICTURES = 8


def write_training_report(
    protection: UniversalProtection,
    surrogate: Surrogate,
    samples: Iterable[Sample | Rejection],
    settings: OneForAllSettings,
) -> str:
    """The report as one self-contained HTML page.

    samples  training images; the first few are shown with their deltas
    """
    figures = protection.figures
    curves = figures["curves"]
    return find_template("one_for_all.html.j2").render(
        protection=protection,
        settings=sorted(
            (name, f"{255 * value:g}/255" if name == "epsilon" else value)
            for name, value in settings.deciding.items()
            if value is not None
        ),
        figures=figures,
        loss=_curve(curves["loss"], figures["steps"], "Training loss"),
        near=_cosines(curves["near_clean"], curves["near"], figures["steps"], "similar concepts"),
        opposite=_cosines(curves["opposite_clean"], curves["opposite"], figures["steps"], "the opposite concept"),
        parameters=sum(
            int(np.prod(array.shape)) for name, array in protection.weights.items() if "running" not in name
        ),
        gallery=[gallery_figures(sample) for sample in _gallery(protection, surrogate, samples, settings)],
    )


def _curve(values: Sequence[float], steps: int, title: str) -> str:
    return _chart([(values, PROTECTED)], steps, title, f"from {values[0]:.3g} to {values[-1]:.3g}")


def _cosines(clean: Sequence[float], protected: Sequence[float], steps: int, what: str) -> str:
    end = f"at the end, clean {clean[-1]:.3g}, protected {protected[-1]:.3g}"
    return _chart([(clean, CLEAN), (protected, PROTECTED)], steps, f"Cosine to {what}", end)


def _chart(lines: Sequence[tuple[Sequence[float], str]], steps: int, title: str, words: str) -> str:
    """Coloured lines over the training steps.

    words  description for screen readers
    """
    with mpl.rc_context(STYLE):
        figure, axes = panel(330, 220)
        for values, colour in lines:
            axes.plot(np.linspace(0, steps, len(values)), values, color=colour, linewidth=1.5)
        axes.set_xlabel("step")
        axes.set_title(title, loc="left")
        return as_svg(figure, f"{title}: {words}")


def _gallery(
    protection: UniversalProtection,
    surrogate: Surrogate,
    samples: Iterable[Sample | Rejection],
    settings: OneForAllSettings,
) -> Iterator[GallerySample]:
    """The first readable pictures, each with its delta."""
    deltas = UniversalDeltas(protection, surrogate)
    for key, pixels in islice(_decoded(samples, settings.max_pixels), SHOWN_PICTURES):
        (answer,) = deltas.for_pictures([DeltaRequest(key, pixels, *pixels.shape[:2])])
        protected = (pixels.astype(np.int16) + answer.delta.levels).clip(0, 255).astype(np.uint8)
        yield GallerySample(key=key, cluster=answer.cluster, original=pixels, protected=protected)


def _decoded(samples: Iterable[Sample | Rejection], max_pixels: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for sample in samples:
        if isinstance(sample, Sample):
            with contextlib.suppress(SampleError):
                suffix = image_suffix(sample)
                data = sample.members[suffix]
                yield sample.key, decode_rgb(data, at_least=1 << 20, max_pixels=max_pixels, suffix=suffix)
