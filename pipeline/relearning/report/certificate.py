"""What an audit certifies about a protection: the most that was relearned, at what cost, over which fits.

certificate.json holds one Certificate per protection whose battery is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.errors import InputError
from pipeline.hashing import canonical, sha256
from pipeline.json_record import JsonRecord
from pipeline.measures.scores import score_picture
from pipeline.records import Commit
from pipeline.relearning.evaluation import CLEAN, WHOLE
from pipeline.relearning.presets import AUDIT, AUDIT_CPU
from pipeline.relearning.report.descriptions import describe_regime
from pipeline.relearning.report.results import MeanAccuracy, Row, mean_accuracies, select
from pipeline.report.page import find_template
from pipeline.runs.run_record import read_run
from pipeline.storage.store import Store

BATTERIES = {"audit": AUDIT, "audit-cpu": AUDIT_CPU}  # widest first
FEWEST_FITS, FEWEST_SEEDS = 3, 2
CERTIFICATE, PAGE = "certificate.json", "certificate.html"  # below the output of an evaluation


@dataclass(frozen=True)
class CertifiedFit:
    """One fit; collection_sha256 is the `collection_digest` of its shards."""

    url: str
    fingerprint: str
    protection_sha256: str
    collection_sha256: str
    num_shards: int


@dataclass(frozen=True)
class Visibility:
    """How visible the deltas are, over `images` pictures from all fits at the evaluation's side.

    PSNR in dB, SSIM in [-1, 1] (see pipeline.measures.scores); 99 % of the pictures reach at least the `_p1` value
    """

    images: int
    psnr_median: float
    psnr_p1: float
    ssim_median: float
    ssim_p1: float


@dataclass(frozen=True)
class CertifiedAccuracy:
    """One cell: accuracy on clean test images in [0, 1], mean over fits and seeds; `clean` is that of the control."""

    labelling: str
    target: str
    regime: str
    accuracy: float
    sd: float | None
    fits: tuple[float, ...]
    clean: float


@dataclass(frozen=True)
class Recovery:
    """The regime and target with the highest accuracy, and the seconds one such training takes on `device`."""

    target: str
    regime: str
    accuracy: float
    fits: tuple[float, ...]
    seconds: float
    device: str


@dataclass(frozen=True)
class Certificate:
    """What was measured, and on what. Accuracies are those under the first labelling.

    data      digest of the clean training and test images
    side      of the images, in pixels
    settings  of the evaluation
    """

    protection: str
    battery: str
    data: str
    side: int
    num_train: int
    num_test: int
    num_classes: int
    epsilon: float
    epochs: int
    seeds: int
    visibility: Visibility
    worst: Recovery
    clean: Recovery
    accuracies: tuple[CertifiedAccuracy, ...]
    fits: tuple[CertifiedFit, ...]
    settings: Mapping[str, Any]
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Certificates(JsonRecord):
    """certificate.json."""

    certificates: tuple[Certificate, ...]

    def of(self, collection_sha256: str) -> tuple[Certificate, int] | None:
        """The certificate that covers a collection, and the number of its fit, from 1; None if it is not certified."""
        for certificate in self.certificates:
            for number, fit in enumerate(certificate.fits, start=1):
                if fit.collection_sha256 == collection_sha256:
                    return certificate, number
        return None

    def page(self) -> str:
        """The certificates as one self-contained HTML page."""
        template = find_template("certificate.html.j2", describe=describe_regime)
        return template.render(certificates=self.certificates)


def collection_digest(shards: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over (name, SHA-256) of every protected shard, sorted by name."""
    return sha256(canonical(sorted(map(list, shards))))


def fit_at(store: Store, url: str) -> CertifiedFit:
    """The fit stored in an output. Raises InputError if there is none, if it is unfinished, or a commit cannot be read.

    url   as it is to be shown
    """
    record = read_run(store)
    names = sorted(name for name in store.names(layout.COMMITS) if name.endswith(".json"))
    if len(names) < record.num_shards:
        raise InputError(f"{url}: {len(names):,} of {record.num_shards:,} shards are committed; finish the run first")
    commits = [Commit.from_bytes(store.read(name), f"{store.url}/{name}") for name in names]
    return CertifiedFit(
        url=url,
        fingerprint=record.fingerprint,
        protection_sha256=sha256(store.read(layout.PROTECTION)),
        collection_sha256=collection_digest((commit.shard, commit.output_sha256) for commit in commits),
        num_shards=len(commits),
    )


def lacking(rows: Sequence[Row], protection: str, fits: int, labelling: str) -> str:
    """What is still missing before a protection can be certified, for people; "" if nothing."""
    own, clean = (select(rows, name, labelling, WHOLE) for name in (protection, CLEAN))
    battery, missing = min(
        ((name, set(regimes) - {str(row["regime"]) for row in own}) for name, regimes in BATTERIES.items()),
        key=lambda pair: len(pair[1]),
    )
    if missing:
        return f"the {battery} battery lacks {', '.join(sorted(missing))}"
    if fits < FEWEST_FITS:
        return f"{FEWEST_FITS} fits are needed; there {'is' if fits == 1 else 'are'} {fits}"
    cells = {(row["target"], row["regime"]) for row in (*own, *clean)}
    for target, regime in sorted(cells):
        for arm, trials, number in ((protection, own, fits), (CLEAN, clean, 1)):
            trained = Counter(
                row["fit"]
                for row in trials
                if (row["target"], row["regime"]) == (target, regime) and not row["diverged"]
            )
            if len(trained) < number or min(trained.values()) < FEWEST_SEEDS:
                return f"{regime} on {arm} ({target}): {FEWEST_SEEDS} trainings per fit are needed"
    return ""


def certify(
    rows: Sequence[Row],
    protection: str,
    *,
    epsilon: float,
    visibility: Visibility,
    fits: Sequence[CertifiedFit],
    settings: Mapping[str, Any],
    labelling: str = "original",
) -> Certificate:
    """The certificate of a protection for which `lacking` finds nothing missing."""
    own, clean = (select(rows, name, labelling, WHOLE) for name in (protection, CLEAN))
    reached, control = (mean_accuracies(arm, ("target", "regime")) for arm in (own, clean))
    first = own[0]
    has = {str(row["regime"]) for row in own}
    return Certificate(
        protection=protection,
        battery=next(name for name, regimes in BATTERIES.items() if set(regimes) <= has),
        data=str(next(row["data"] for row in clean if row["regime"] == "nt")),  # others may be cleaned by a denoiser
        side=first["side"],
        num_train=first["num_train"],
        num_test=first["num_test"],
        num_classes=first["num_classes"],
        epsilon=epsilon,
        epochs=first["epochs"],
        seeds=len({row["seed"] for row in own}),
        visibility=visibility,
        worst=_recovery(own, reached),
        clean=_recovery(clean, control),
        accuracies=tuple(
            CertifiedAccuracy(
                labelling, target, regime, cell.mean or 0.0, cell.sd, cell.fits, control[target, regime].mean or 0.0
            )
            for (target, regime), cell in reached.items()
        ),
        fits=tuple(fits),
        settings=settings,
        versions=tuple(sorted({str(row["versions"]) for row in own})),
    )


def _recovery(rows: Sequence[Row], cells: Mapping[tuple[Any, ...], MeanAccuracy]) -> Recovery:
    target, regime = max(cells, key=lambda cell: cells[cell].mean or 0.0)
    best = cells[target, regime]
    chosen = [row for row in rows if (row["target"], row["regime"]) == (target, regime)]
    seconds = float(np.mean([row["seconds"] for row in chosen]))
    return Recovery(target, regime, best.mean or 0.0, best.fits, seconds, str(chosen[0]["device"]))


def scores_of(original: NDArray[np.uint8], protected: NDArray[np.uint8]) -> list[tuple[float, float]]:
    """(PSNR in dB, SSIM) of every picture; both arrays uint8 [n, 3, S, S]."""
    pairs = zip(original.transpose(0, 2, 3, 1), protected.transpose(0, 2, 3, 1), strict=True)
    scores = [score_picture("", 0, before, after) for before, after in pairs]
    return [(score.psnr, score.ssim) for score in scores]


def visibility_of(scores: Sequence[tuple[float, float]]) -> Visibility:
    """A protection's visibility from (PSNR, SSIM) of pictures from all its fits."""
    (psnr, psnr_p1), (ssim, ssim_p1) = (
        np.nanpercentile(column, (50, 1)).tolist() for column in zip(*scores, strict=True)
    )
    return Visibility(len(scores), psnr, psnr_p1, ssim, ssim_p1)
