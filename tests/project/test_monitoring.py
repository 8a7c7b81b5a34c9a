"""Alerts fire when they should, and everything that dashboard and alerts ask for answers in a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.shared.metrics import exported
from pipeline import metrics
from tests.support import runs
from tests.support.manifests import K8S, rules
from tests.support.samples import free_port

VALUES = {
    "stage": metrics.STAGES,
    "step": metrics.STEPS,
    "state": metrics.STATES,
    "direction": ("in", "out"),
    "outcome": ("equal", "different"),
    "reason": ("empty", "too-large"),
    "command": ("protect_uploads",),
    "protection": ("uc",),
    "regime": ("nt", "st"),
}


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install prometheus)")


def test_alert_rules_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    needs("promtool")
    (tmp_path / "alerts.rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(K8S / "monitoring" / "alerts_test.yaml", tmp_path)
    for words in (["check", "rules", "alerts.rules.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load((K8S / "monitoring" / "alerts_test.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule}


class Prometheus:
    """A server of this test alone, that scrapes `targets` every second with the PodMonitor's relabelling."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        (monitor,) = yaml.safe_load_all((K8S / "monitoring" / "pod-monitors.yaml").read_text())
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
        relabelling = [{names.get(k, k): v for k, v in one.items()} for one in endpoint["metricRelabelings"]]
        job = {
            "job_name": "scumble",
            "static_configs": [{"targets": targets, "labels": {"namespace": "scumble", "component": "test"}}],
            "metric_relabel_configs": relabelling,
        }
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules()))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [job],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"),
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that an expression gives now."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        samples: list[dict[str, Any]] = found["data"]["result"]
        return samples

    def value(self, expression: str) -> float | None:
        """The one value of an expression; None for no answer yet."""
        with contextlib.suppress(OSError):
            if samples := self.query(expression):
                return float(samples[0]["value"][1])
        return None


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "what was waited for never came"
        time.sleep(0.5)


def everything(recorder: metrics.Recorder) -> None:
    """Report every metric once under every value of its labels."""
    for metric in metrics.METRICS:
        combinations: list[dict[str, str]] = [{}]
        for label in metric.labels:
            combinations = [each | {label: value} for each in combinations for value in VALUES[label]]
        for labels in combinations:
            recorder.record(metric, time.time() if "timestamp" in metric.name else 1, **labels)


def asked() -> Iterator[str]:
    """Every query of the dashboard, with Grafana's variables filled in."""
    dashboard = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in (
                ("__rate_interval", "30s"),
                ("__range", "1m"),
                ("namespace", ".*"),
                ("component", ".*"),
            ):
                expression = expression.replace(f"${name}", value)
            yield expression


@pytest.mark.slow
def test_every_query_of_the_dashboard_answers_and_every_rule_is_loaded(tmp_path: Path) -> None:
    needs("prometheus")
    port = free_port()
    with exported(port=port, address="127.0.0.1") as recorder:
        everything(recorder)
        with contextlib.closing(Prometheus(tmp_path, [f"127.0.0.1:{port}"])) as prometheus:
            wait_for(lambda: prometheus.value("count_over_time(up[1m])") is not None, 60)
            for _ in range(4):
                everything(recorder)
                time.sleep(1.5)
            for expression in asked():
                assert prometheus.query(expression), expression
            wait_for(lambda: prometheus.value('ALERTS{alertname="ScumbleBudgetViolation"}') == 1, 30)
            url = f"http://127.0.0.1:{prometheus.port}/api/v1/rules"
            with urllib.request.urlopen(url) as answer:
                loaded = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
            assert {rule["health"] for rule in loaded} == {"ok"}
            assert len(loaded) == len(rules()["groups"][0]["rules"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """Address of a Ray cluster of this machine, and the port on which its node exports metrics."""
    import tempfile

    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    folder, port = tempfile.mkdtemp(prefix="ray-"), free_port()
    options = {
        "num_cpus": 2,
        "include_dashboard": False,
        "metrics_export_port": port,
        "object_store_memory": 300_000_000,
    }
    made = Cluster(initialize_head=True, head_node_args=options | {"temp_dir": folder})
    try:
        yield made.address, port
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("RAY_AUTH_MODE")
        if before is not None:
            os.environ["RAY_AUTH_MODE"] = before


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_run_on_a_cluster_is_seen_by_prometheus(cluster: tuple[str, int], tmp_path: Path) -> None:
    needs("prometheus")
    address, port = cluster
    runs.write_collection(tmp_path / "in", shards=4, per_shard=16)
    environment = os.environ | {"RAY_ADDRESS": address}
    with contextlib.closing(Prometheus(tmp_path, [f"127.0.0.1:{port}"])) as prometheus:
        wait_for(lambda: prometheus.value("max(up)") == 1, 60)
        job = runs.command(str(tmp_path / "in"), str(tmp_path / "out"), *runs.SMALL, *runs.ONE_WORKER)
        done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        totals = {
            'sum(scumble_images_total{stage="embed"})': 64,
            'sum(scumble_images_total{stage="apply"})': 64,
            'sum(scumble_shards_total{stage="apply", state="done"})': 4,
            'sum(scumble_shard_seconds_count{stage="apply"})': 4,
        }
        for expression, expected in totals.items():
            wait_for(lambda e=expression, n=expected: prometheus.value(e) == n, 60)  # type: ignore[misc]
        success = 'max_over_time(scumble_last_success_timestamp_seconds{command="protect_imagenet"}[5m])'
        wait_for(lambda: time.time() - (prometheus.value(success) or 0) < 120, 60)
        for step in ("read", "decode", "encode", "put"):
            assert (prometheus.value(f'sum(scumble_stage_seconds_total{{stage="apply", step="{step}"}})') or 0) > 0
        assert (prometheus.value('sum(scumble_stage_seconds_total{stage="fit", step="model"})') or 0) > 0
        # Ray exports every 10 s: of so short a stage only the end is seen
        assert prometheus.value('min(min_over_time(scumble_queue_depth{stage="apply"}[5m]))') == 0
        assert prometheus.query("scumble_budget_violations_total") == []
        assert prometheus.query("ray_scumble_images_total") == []


@pytest.mark.slow
@pytest.mark.ray
def test_the_doctor_asks_every_node_of_a_cluster(cluster: tuple[str, int]) -> None:
    address, _ = cluster
    command = [sys.executable, str(runs.ROOT / "jobs" / "doctor.py")]
    environment = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run([*command], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok       cluster      1 nodes, 2 CPUs, 0 GPUs" in done.stdout
    assert f"ok       {address.rpartition(':')[0]}" in done.stdout
    asking = subprocess.run(
        [*command, "--gpus-per-worker", "1"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert asking.returncode == 1
    assert "error    cluster      no node of the Ray cluster has 1 GPU and a CPU" in asking.stdout
