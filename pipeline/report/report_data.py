"""What a run left behind -> the data for its report. Reads small files only; needs no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from pipeline import layout
from pipeline.clusters.clustering import ClusterReport
from pipeline.deltas.load import AnyProtection, load_protection
from pipeline.measures.gallery import GallerySample, gallery_from_bytes
from pipeline.measures.removal import RemovalCheck
from pipeline.measures.scores import PictureScore, scores_from_parquet
from pipeline.records import Rejection, losses_of, quarantine_from_bytes, read_quarantine
from pipeline.report.report_page import SHOWN_REJECTIONS, ClusterRow, ReportData, StageRate
from pipeline.runs.run_record import RunStatus, read_run
from pipeline.runs.totals import Totals, totals_of
from pipeline.storage.store import Store

_RUN_STAGES = ("embed", "label", "cluster", "fit", "apply", "measure")
_APPLY_STAGES = ("read", "decode", "delta", "add", "encode", "write", "put")


def report_data(output: Store) -> ReportData:
    """The data for a run's report. Raises InputError if no run has started in `output`."""
    record = read_run(output)
    totals = totals_of(output)
    status = RunStatus.read(output, layout.STATUS)
    settings = record.ingredients.settings
    protection = _protection(output)
    return ReportData(
        input_url=record.input,
        output_url=output.url,
        method=_method(settings, protection),
        epsilon=settings["epsilon"] if protection is None else protection.epsilon,
        fingerprint=record.fingerprint,
        num_protected=totals.images,
        num_quarantined=totals.quarantined,
        num_shards=totals.shards,
        input_image_bytes=totals.input_image_bytes,
        output_image_bytes=totals.output_image_bytes,
        num_finer=totals.finer,
        num_reread=totals.reread,
        survival=totals.survival,
        finished=status.updated if status else "",
        stages=_stages(totals, status.stage_seconds if status else {}),
        clusters=_clusters(totals, protection),
        clustering=ClusterReport.read(output, layout.CLUSTERS_REPORT),
        gallery=_gallery(output),
        removal=RemovalCheck.read(output, layout.REMOVAL),
        scores=_scores(output),
        quarantine=dict(sorted(totals.reasons.items())),
        rejections=_rejections(output, totals),
        lost=tuple(losses(output, totals.damaged)),
        settings=settings,
        versions=record.ingredients.versions,
    )


def _protection(output: Store) -> AnyProtection | None:
    data = output.read_if_there(layout.PROTECTION)
    return None if data is None else load_protection(data)


def _method(settings: Mapping[str, Any], protection: AnyProtection | None) -> str:
    """How the deltas were made; a protection passed in need not match what the settings would have fitted."""
    if "labels" in settings:
        return _baseline(settings, protection)
    if settings["method"] == "one-for-all":
        return "One for All, a universal generator"
    how = {
        "distilled": "one delta per image, by a network trained through proxies",
        "sample": "one delta per image, optimised through proxies",
        "direct": f"deltas optimised directly through the {settings['optimise_through']}",
        "network": "one generator network per cluster, through the surrogate",
        "texture": "keyed random-phase textures",
    }
    generator = settings["generator"] if protection is None else protection.generator
    return f"Unlearnable Clusters, {how[generator]}"


_FOLLOWED = {"none": "", "true": ", by true labels", "predicted": ", by predicted labels", "cluster": ", by clusters"}
_BOUNDED = {"l2": "; bounded in L2 norm, of which ε came out", "none": "; not bounded, ε is what came out"}


def _baseline(settings: Mapping[str, Any], protection: AnyProtection | None) -> str:
    """A published method, what it followed, and what bounds it."""
    figures = {} if protection is None else protection.figures
    source = f" ({figures['source']})" if "source" in figures else ""
    each = "image" if protection is not None and protection.per_sample else "label"
    bound = _BOUNDED.get(figures.get("bound", ""), "")
    return f"Baseline {settings['method']}{source}, one delta per {each}{_FOLLOWED[settings['labels']]}{bound}"


def _stages(totals: Totals, wall: Mapping[str, float]) -> tuple[StageRate, ...]:
    """Wall time of each stage, then process seconds of the steps of apply."""
    stages = [StageRate(name, totals.images, wall[name]) for name in _RUN_STAGES if name in wall]
    sizes = {
        "read": totals.input_bytes,
        "decode": totals.input_image_bytes,
        "encode": totals.output_image_bytes,
        "put": totals.output_bytes,
    }
    for name in _APPLY_STAGES:
        stages.append(StageRate(f"apply: {name}", totals.images, totals.seconds[name], sizes.get(name, 0)))
    return tuple(stages)


def _clusters(totals: Totals, protection: AnyProtection | None) -> tuple[ClusterRow, ...]:
    sizes = totals.clusters
    if protection is None:
        return ()
    figures = protection.figures
    moved, before, losses = (figures.get(name, ()) for name in ("moved", "before", "losses"))
    return tuple(
        ClusterRow(
            index=cluster,
            images=sizes[cluster],
            target_cluster=protection.targets[cluster] if protection.targets else None,
            moved=moved[cluster] if moved else None,
            moved_clean=before[cluster] if before else None,
            losses=tuple(losses[cluster]) if losses else (),
        )
        for cluster in range(len(protection.clustering.centroids))
        if protection.targets or sizes[cluster]  # a label of a classifier may have no image
    )


def _gallery(output: Store) -> tuple[GallerySample, ...]:
    data = output.read_if_there(layout.GALLERY)
    return () if data is None else gallery_from_bytes(data, f"{output.url}/{layout.GALLERY}")


def _scores(output: Store) -> tuple[PictureScore, ...]:
    data = output.read_if_there(layout.SCORES)
    return () if data is None else tuple(scores_from_parquet(data, f"{output.url}/{layout.SCORES}"))


def losses(output: Store, damaged: Iterable[str]) -> Iterator[str]:
    """Lines about input that was not read: names passed over, then parts of damaged shards."""
    passed_over = output.read_if_there(layout.PASSED_OVER) or b""
    for rejection in quarantine_from_bytes(passed_over, f"{output.url}/{layout.PASSED_OVER}"):
        yield f"{rejection.key}: {rejection.detail}"
    for shard in damaged:
        yield from losses_of(shard, read_quarantine(output, layout.quarantine(shard)))


def _rejections(output: Store, totals: Totals) -> tuple[Rejection, ...]:
    """The first few rejections, in shard order."""
    files = (read_quarantine(output, layout.quarantine(shard)) for shard in totals.refusing)
    return tuple(islice(chain.from_iterable(files), SHOWN_REJECTIONS))
