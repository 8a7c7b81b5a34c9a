"""Metrics have one table, few labels, and the values that a run really has."""

from __future__ import annotations

import json
import re
import tarfile
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from actors.cluster.batches import RunContext, shard_rows
from actors.embedder import Embedder
from actors.fit_queue import FitQueue
from actors.protector import Protector
from jobs.evaluation.metrics import RelearnedSoFar
from jobs.shared.metrics import PrometheusRecorder, exported
from pipeline import layout, metrics
from pipeline.clusters.clustering import Clustering, ClusterSpace
from pipeline.deltas.protection import Protection
from pipeline.errors import ConflictError, PromiseError, SettingsError
from pipeline.records import Commit, Shard
from pipeline.relearning.evaluation import EvaluationSettings, Trial
from pipeline.relearning.report.results import relearned_by_regime
from pipeline.runs.transaction import ShardTransaction
from pipeline.settings import Settings
from pipeline.storage.store import Store
from pipeline.surrogates.features import assignment_from_parquet
from tests.support.runs import add, write_collection
from tests.support.samples import free_port

SURROGATE, SIDE = "timm:tf_efficientnet_lite0", 64
UNBOUNDED = {"shard", "key", "image", "name", "path", "url", "fingerprint", "worker", "error"}


def test_names_are_unique_well_formed_and_labels_take_few_values() -> None:
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)
    for metric in metrics.METRICS:
        assert re.fullmatch(r"scumble_[a-z_]+(?<!_total)", metric.name), metric.name
        assert not UNBOUNDED & set(metric.labels), metric.name
        assert metric.help
        assert metric.unit
        assert bool(metric.buckets) == (metric.kind == "histogram")


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """`name{labels}` -> value of everything but bookkeeping, as a scrape would read it."""
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#") and "_created" not in line]
    return {name: float(value) for name, _, value in pairs}


class Small:
    """Two shards, one broken image, and actors that are called without Ray."""

    def __init__(self, folder: Path) -> None:
        write_collection(folder / "in", shards=2, per_shard=6)
        with tarfile.open(folder / "in" / "photos-000.tar", "a") as tar:
            add(tar, "000/9999.jpg", b"no image at all")
        source = Store(str(folder / "in"))
        self.output = Store(str(folder / "out"))
        settings = Settings(surrogate=SURROGATE, surrogate_size=SIDE)
        self.context = RunContext(source, self.output, settings, "f" * 64, threads=1, device="cpu")
        self.shards = [Shard(entry.name, entry.size, entry.etag) for entry in source.list()]
        self.recorder = PrometheusRecorder(CollectorRegistry())

    def embedder(self) -> Embedder:
        made = Embedder(self.context)
        made.metrics = self.recorder
        rng = np.random.default_rng(0)
        means = rng.normal(size=(3, made.surrogate.dimension)).astype(np.float32)
        near, far = np.float32(0), np.float32(1e9)  # everything is far from the first cluster, nothing from others
        clustering = Clustering(ClusterSpace(), means, means, np.array([near, far, far], np.float32))
        levels = rng.integers(-16, 17, (3, 3, 8, 8)).astype(np.int8)
        made.protection = Protection(
            "uc", "direct", made.surrogate.id, 16 / 255, clustering, (1, 2, 0), levels, self.context.fingerprint
        )
        self.output.put(layout.PROTECTION, made.protection.to_bytes())
        return made

    def protector(self) -> Protector:
        made = Protector(self.context)
        made.metrics = self.recorder
        return made

    def batch(self) -> dict[str, Any]:
        rows = shard_rows(self.shards)
        return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small run, embedded and applied."""
    small = Small(tmp_path_factory.mktemp("metrics"))
    small.embedder()(small.batch())
    small.protector()(small.batch())
    return small


def test_a_small_run_reports_what_it_did(run: Small) -> None:
    found = samples(run.recorder.registry)
    commits = [Commit.from_json(_json(run.output, shard.name)) for shard in run.shards]
    for stage in ("embed", "apply"):
        assert found[f'scumble_images_total{{stage="{stage}"}}'] == 12
        assert found[f'scumble_shards_total{{stage="{stage}",state="done"}}'] == 2
        assert found[f'scumble_quarantined_images_total{{reason="unsupported-format",stage="{stage}"}}'] == 1
        assert found[f'scumble_shard_seconds_count{{stage="{stage}"}}'] == 2
        assert found[f'scumble_bytes_total{{direction="in",stage="{stage}"}}'] == sum(s.size for s in run.shards)
    assert found['scumble_bytes_total{direction="out",stage="apply"}'] == sum(c.output_size for c in commits)
    for stage, steps in {
        "embed": {"read", "decode", "copy", "resize", "model", "put"},
        "apply": {"read", "decode", "delta", "add", "encode", "put"},
    }.items():
        seconds = {s: found.get(f'scumble_stage_seconds_total{{stage="{stage}",step="{s}"}}') for s in metrics.STEPS}
        assert {step for step, spent in seconds.items() if spent} == steps
    assert "scumble_budget_violations_total" not in str(found)
    assert found['scumble_assigned_images_total{stage="embed"}'] == 12


def test_drift_counts_what_lies_beyond_the_fitted_images_of_its_cluster(run: Small) -> None:
    clusters = [_clusters(run.output, shard.name) for shard in run.shards]
    in_first = sum(int((each == 0).sum()) for each in clusters)
    assert samples(run.recorder.registry).get('scumble_drifted_images_total{stage="embed"}', 0) == in_first


def test_a_shard_that_is_committed_is_skipped_and_no_image_counted_twice(run: Small) -> None:
    again = run.protector()
    again.metrics = PrometheusRecorder(registry := CollectorRegistry())
    again(run.batch())
    assert samples(registry) == {'scumble_shards_total{stage="apply",state="skipped"}': 2.0}


def test_commits_that_were_made_by_somebody_else_are_counted_by_how_they_compare(
    run: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = run.protector()
    late.metrics = PrometheusRecorder(registry := CollectorRegistry())
    real, calls = ShardTransaction.committed, iter([None])
    monkeypatch.setattr(ShardTransaction, "committed", lambda self, shard: next(calls, real(self, shard)))
    late._protect(run.shards[0])
    assert samples(registry)['scumble_commit_conflicts_total{outcome="equal",stage="apply"}'] == 1

    other = run.output.read(layout.commit(run.shards[1].name))
    changed = Commit.from_json(_json(run.output, run.shards[1].name))
    run.output.put(layout.commit(changed.shard), other.replace(changed.output_sha256.encode(), b"0" * 64))
    calls = iter([None])
    with pytest.raises(ConflictError):
        late._protect(run.shards[1])
    run.output.put(layout.commit(changed.shard), other)
    found = samples(registry)
    assert found['scumble_commit_conflicts_total{outcome="different",stage="apply"}'] == 1
    assert found['scumble_shards_total{stage="apply",state="failed"}'] == 1


def test_a_broken_promise_is_a_budget_violation() -> None:
    recorder = PrometheusRecorder(CollectorRegistry())
    metrics.report_failure(recorder, "apply", PromiseError("the bound does not hold"))
    metrics.report_failure(recorder, "apply", OSError("disk"))
    found = samples(recorder.registry)
    assert found['scumble_budget_violations_total{stage="apply"}'] == 1
    assert found['scumble_shards_total{stage="apply",state="failed"}'] == 2


def test_a_group_of_train_workers_that_replaces_a_dead_one_counts_as_a_restart() -> None:
    queue = FitQueue(["0", "1", "2"])
    queue._metrics = PrometheusRecorder(registry := CollectorRegistry())
    for worker, group in (("0", "a"), ("1", "a"), ("0", "b"), ("1", "b")):
        queue.take(worker, group)
    assert samples(registry) == {'scumble_actor_restarts_total{stage="fit"}': 1.0}


def test_relearned_accuracy_is_the_best_target_s_mean_over_seeds_of_each_regime() -> None:
    def row(regime: str, target: str, accuracy: float, **other: Any) -> dict[str, Any]:
        fixed = {"protection": "uc", "fit": 0, "labelling": "original", "share": "samples:1", "diverged": False}
        return fixed | {"regime": regime, "target": target, "accuracy_last": accuracy} | other

    rows = [row("nt", "small", 0.2), row("nt", "small", 0.4), row("nt", "vit", 0.25), row("st", "small", 0.6)]
    rows += [row("st", "vit", 0.9, diverged=True), row("st", "small", 1.0, share="samples:0.5")]
    rows += [row("at", "small", 0.1, diverged=True)]
    assert relearned_by_regime(rows, "uc") == pytest.approx({"nt": 0.3, "st": 0.6})


def test_an_evaluation_tells_what_was_relearned_so_far_earlier_starts_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, recorder = Store(str(tmp_path)), PrometheusRecorder(CollectorRegistry())
    monkeypatch.setattr("jobs.evaluation.metrics.recorder", lambda: recorder)
    fixed: dict[str, Any] = {
        "protection": "uc",
        "fit": 0,
        "target": "small",
        "labelling": "original",
        "share": "samples:1",
        "epochs": 2,
    }
    fixed |= {"recipe": "fast", "data": "d", "labels": "l"}
    trials = [Trial(**fixed, regime=regime, seed=seed) for regime in ("nt", "st") for seed in (0, 1)]
    for trial, accuracy in zip(trials, (0.2, 0.4, 0.5, 0.7), strict=True):
        row = asdict(trial) | {"accuracy_last": accuracy, "diverged": False, "num_train": 10, "seconds": 3.0}
        row |= {"key": trial.key, "history": [], "num_classes": 10}
        store.put(trial.result, json.dumps(row).encode())
    settings = EvaluationSettings(clean="a", test="b", output="c", protected={"uc": ("d",)})
    so_far = RelearnedSoFar(settings, store, trials[:2])
    figure = 'scumble_relearned_accuracy{protection="uc",regime="%s"}'
    assert samples(recorder.registry) == {figure % "nt": pytest.approx(0.3)}
    so_far.add(trials[2])
    found = samples(recorder.registry)
    assert found[figure % "st"] == 0.5
    so_far.add(trials[3])
    found = samples(recorder.registry)
    assert found[figure % "st"] == pytest.approx(0.6)
    assert found['scumble_images_total{stage="relearn"}'] == 40
    assert found['scumble_stage_seconds_total{stage="relearn",step="model"}'] == 6


def test_jobs_without_ray_serve_their_metrics_on_a_port_and_leave_a_file(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "uploads.prom"
    with exported(port=port, file=str(file), address="127.0.0.1") as recorder:
        metrics.report_success(recorder, "protect_uploads")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            scraped = answer.read().decode()
        with pytest.raises(SettingsError, match=f"--metrics-port {port}: .*; choose a free port"):
            exported(port=port, address="127.0.0.1").__enter__()
    assert 'scumble_last_success_timestamp_seconds{command="protect_uploads"} 1.' in scraped
    assert file.read_text() == scraped


def test_a_file_that_cannot_be_written_is_refused_before_the_job_begins(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--metrics-file .*No such file.*choose a file in an existing folder"):
        exported(file=str(tmp_path / "none" / "x.prom")).__enter__()


def _json(output: Store, shard: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.read(layout.commit(shard)))
    return found


def _clusters(output: Store, shard: str) -> Any:
    return assignment_from_parquet(output.read(layout.assignment(shard))).clusters
