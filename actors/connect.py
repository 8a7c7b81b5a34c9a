"""Reach a Ray cluster, or start a private one; the table of who gets how many CPUs and GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import ray

from pipeline.errors import InputError, one_line

OBJECT_STORE_BYTES = 1_000_000_000  # of a private cluster: only encoded bytes and uint8 pictures travel


class Asked(Protocol):
    """What a job's settings say of the cluster."""

    @property
    def workers(self) -> int | None: ...

    @property
    def gpus_per_worker(self) -> float: ...

    @property
    def debug(self) -> bool: ...


@dataclass(frozen=True)
class Workers:
    """How a stage is spread: so many processes, each with so many CPUs (threads) and GPUs."""

    count: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def on_cpus(self) -> Workers:
        """One process per CPU of these workers: for stages that need no GPU."""
        total = max(1, int(self.count * self.cpus))
        return Workers(self.count, self.cpus, 0.0) if not self.gpus else Workers(total, 1.0, 0.0)


@contextlib.contextmanager
def connected(settings: Asked) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (as inside a submitted job), else run a private one for the while.

    Raises InputError if a cluster is named but does not answer.
    """
    quiet = {"logging_level": "INFO" if settings.debug else "ERROR", "log_to_driver": settings.debug}
    if "RAY_ADDRESS" in os.environ:
        try:
            ray.init(address=_cluster_address(), **quiet)
        except ConnectionError as error:
            raise InputError(
                f"the Ray cluster at RAY_ADDRESS does not answer ({error}); unset RAY_ADDRESS to run here"
            ) from None
        with contextlib.ExitStack() as stack:
            stack.callback(ray.shutdown)
            _quiet_data(settings)
            yield
        return
    with _private_cluster(quiet, "info" if settings.debug else "fatal"):
        _quiet_data(settings)
        yield


def _cluster_address() -> str:
    """Inside a job RAY_ADDRESS may be the dashboard's http address; the cluster itself is then found by `auto`."""
    address = os.environ["RAY_ADDRESS"]
    return "auto" if address.startswith("http") else address


@contextlib.contextmanager
def _private_cluster(quiet: Mapping[str, object], log_level: str) -> Iterator[None]:
    """A cluster of this machine alone, behind a token that only this process and its children know.

    Ray turns tokens on by itself unless RAY_AUTH_MODE says otherwise; ours keeps it from writing one to the home.
    log_level is that of Ray's own processes: what they say of inner workings is no line for a user.
    """
    mine = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": log_level,
    }
    before = {name: os.environ.get(name) for name in (*mine, "RAY_AUTH_MODE")}
    os.environ.update(mine)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: unix socket paths end at 107 bytes
    try:
        _start(folder, quiet)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(folder: str, quiet: Mapping[str, object]) -> None:
    """Raises InputError if the machine is too busy or too full for Ray to start."""
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=folder,
            **quiet,
        )
    except Exception as error:  # Ray raises no narrower one for a node that does not come up in time
        line = one_line(error)
        advice = "free memory, give TMPDIR a short path, or wait"
        raise InputError(f"Ray did not start on this machine ({line}); {advice}") from error


def _quiet_data(settings: Asked) -> None:
    """Our own bars tell the progress, our own line the failure; a stage may wait for machines as long as it takes."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = settings.debug
    context.execution_options.verbose_progress = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    if not settings.debug:
        for name in ("ray.data", "ray.train", "ray._private"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def workers_for(settings: Asked) -> Workers:
    """Processes of a stage: one per GPU share, or one per CPU, unless --workers says otherwise.

    Raises InputError if the cluster has not what is asked for: an actor that cannot be placed would wait for ever.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if settings.gpus_per_worker:
        possible = int(gpus / settings.gpus_per_worker)
        if not possible:
            raise InputError(f"--gpus-per-worker {settings.gpus_per_worker:g}: the cluster has {gpus:g} GPUs")
        count = min(settings.workers or possible, possible)
        return Workers(count, min(max(1.0, cpus // count), cpus_of_a_node()), settings.gpus_per_worker)
    if cpus < 1:
        raise InputError("the Ray cluster has no CPU to work with; start a worker node")
    count = min(settings.workers or int(cpus), int(cpus))
    return Workers(count, min(float(max(1, cpus // count)), cpus_of_a_node()), 0.0)


def cpus_of_a_node() -> float:
    """CPUs of the largest node: a process that asked for more would wait for ever."""
    return max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
