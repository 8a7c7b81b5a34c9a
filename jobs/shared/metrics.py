"""Metrics of jobs that may run without Ray: on a port for Prometheus to scrape, or in a file for node_exporter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server, write_to_textfile

from actors.cluster.metrics import recorder
from pipeline.errors import SettingsError
from pipeline.metrics import Metric, Recorder


class PrometheusRecorder:
    """Reports into a registry of prometheus_client, under the names of pipeline.metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._made: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """As pipeline.metrics.Recorder says."""
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        made = self._made[metric.name]
        made = made.labels(**labels) if metric.labels else made
        if metric.kind == "gauge":
            made.set(value)
        elif metric.kind == "histogram":
            made.observe(value)
        elif value > 0:
            made.inc(value)

    def _make(self, metric: Metric) -> Any:
        about = (metric.name, f"{metric.help} [{metric.unit}]", metric.labels)
        if metric.kind == "histogram":
            return Histogram(*about, registry=self.registry, buckets=metric.buckets)
        return (Gauge if metric.kind == "gauge" else Counter)(*about, registry=self.registry)


class InRay:
    """Reports to the cluster that this process is in by then, if any."""

    def record(self, metric: Metric, value: float, **labels: str) -> None:
        """As pipeline.metrics.Recorder says."""
        recorder().record(metric, value, **labels)


@contextlib.contextmanager
def exported(
    *, port: int | None = None, file: str | None = None, linger: float | None = None, address: str = "0.0.0.0"
) -> Iterator[Recorder]:
    """A recorder whose metrics are exported while the block runs; without port and file, by Ray once it has started.

    linger  seconds to keep the port open after a block that did not fail, so that a last scrape sees its figures
    Raises SettingsError if the port is taken or the file cannot be written.
    """
    if port is None and file is None:
        yield InRay()
        return
    registry = CollectorRegistry()
    with contextlib.ExitStack() as stack:
        if file is not None:
            stack.callback(_write, file, registry)
            _write(file, registry)  # a missing folder is noticed now, not at the end
        if port is not None:
            stack.callback(_serve(port, address, registry))
        yield PrometheusRecorder(registry)
        if port is not None:
            time.sleep(linger or 0.0)


def _serve(port: int, address: str, registry: CollectorRegistry) -> Any:
    """Start serving; returns what stops it."""
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"--metrics-port {port}: {error}; choose a free port") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _write(file: str, registry: CollectorRegistry) -> None:
    try:
        write_to_textfile(str(Path(file)), registry)
    except OSError as error:
        raise SettingsError(f"--metrics-file {file}: {error.strerror}; choose a file in an existing folder") from None
