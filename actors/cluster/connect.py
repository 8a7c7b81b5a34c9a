"""Join a Ray cluster, or start a private one, and find out what it has room for."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ray
from ray._private import parameter, ray_constants
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]  # not in its stub
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RpcError

from actors.cluster.placement import Resources, check_memory, place
from actors.cluster.placement import Workers as Workers
from pipeline.errors import ClusterError, one_line

_STATUS_SECONDS = 10.0
OBJECT_STORE_BYTES = 1_000_000_000  # of a private cluster: only encoded bytes and uint8 pictures travel


class WorkerRequest(Protocol):
    """What the settings of a job say about the cluster."""

    @property
    def workers(self) -> int | None: ...

    @property
    def gpus_per_worker(self) -> float: ...

    @property
    def debug(self) -> bool: ...


@contextlib.contextmanager
def connected(settings: WorkerRequest) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS (as inside a submitted job), else run a private one within the block.

    Raises ClusterError if that cluster does not answer within a minute, or cannot be joined.
    """
    quiet = {"logging_level": "INFO" if settings.debug else "ERROR", "log_to_driver": settings.debug}
    log_level = "info" if settings.debug else "fatal"  # of Ray's own processes: a user has no use for it
    if not settings.debug:  # it prints the tracebacks of workers on stdout, whatever log_to_driver says
        ray._private.worker.listen_error_messages = lambda *_: None
    if "RAY_ADDRESS" in os.environ:
        with _environment({"RAY_BACKEND_LOG_LEVEL": log_level}), contextlib.ExitStack() as stack:
            stack.callback(ray.shutdown)
            _join(os.environ["RAY_ADDRESS"], quiet)
            _quiet_data(settings)
            yield
        return
    with _private_cluster(quiet, log_level):
        _quiet_data(settings)
        yield


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    if address.startswith(("http://", "https://")):  # what `ray job submit` wants; inside a job Ray sets another one
        raise ClusterError(
            f"RAY_ADDRESS={address} is the address of a dashboard: set it to HOST:PORT of the head (port 6379 unless "
            "you chose another), submit the job with `ray job submit`, or unset RAY_ADDRESS to run here"
        )
    ray_constants.NUM_REDIS_GET_RETRIES = 1  # 20 is Ray's, at 40 s each
    try:
        with _silenced(is_quiet=not quiet["log_to_driver"]), _own_handler():
            ray.init(address=address, **quiet)
    except RuntimeError as error:  # versions that differ
        raise ClusterError(
            f"{one_line(error, 300)}: use the same image, or the same constraints.txt, for driver and cluster"
        ) from None
    except Exception as error:
        reason = f"the Ray cluster at RAY_ADDRESS does not answer ({one_line(error, 300)})"
        raise ClusterError(f"{reason}; unset RAY_ADDRESS to run here") from None


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Keep a job's handler of SIGTERM: Ray installs one that ends the process with code 15 and no word."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def _silenced(*, is_quiet: bool) -> Iterator[None]:
    """Silence stderr within the block: until it has a log file, Ray's C++ writes there whatever is set."""
    if not is_quiet:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _environment(mine: Mapping[str, str]) -> Iterator[None]:
    """Set variables within the block."""
    before = {name: os.environ.get(name) for name in (*mine, "RAY_AUTH_MODE")}  # Ray sets that one by itself
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _private_cluster(quiet: Mapping[str, Any], log_level: str) -> Iterator[None]:
    """A cluster of this machine only, behind a token that only this process and its children know.

    Ray turns tokens on unless RAY_AUTH_MODE says otherwise; ours keeps it from writing one to the home folder.
    """
    mine = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": log_level,
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that waits for the cloud to take a node away
        # on a busy machine, threads that wait by spinning take the processor from those they wait for
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    folder = tempfile.mkdtemp(prefix="ray-")  # short: unix socket paths end at 107 bytes
    with contextlib.ExitStack() as stack:
        stack.callback(_read_authentication)
        stack.enter_context(_environment(mine))
        _read_authentication()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(ray.shutdown)
        _start(folder, quiet)
        yield


def _read_authentication() -> None:
    """Have Ray read mode and token from the environment again: it keeps what the first cluster of a process had."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _start(folder: str, quiet: Mapping[str, Any]) -> None:
    """Start Ray. Raises ClusterError if the machine is too busy or too full for it."""
    try:
        with _silenced(is_quiet=not quiet["log_to_driver"]), _own_handler(), _any_agent_port():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
                **quiet,
            )
    except Exception as error:  # Ray raises no narrower one for a node that does not come up in time
        advice = "free memory, give TMPDIR a short path, or wait"
        raise ClusterError(f"Ray did not start on this machine ({one_line(error, 200)}); {advice}") from error


@contextlib.contextmanager
def _any_agent_port() -> Iterator[None]:
    """Have the agent of the node listen at any free port.

    By default Ray gives the agents of all clusters on a machine the same one; all but the first wait seconds for it,
    in vain.
    """
    default = parameter.RayParams
    parameter.RayParams = functools.partial(default, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = default


def _quiet_data(settings: WorkerRequest) -> None:
    """Progress and failures are reported by us, not by Ray; a stage may wait for machines as long as it takes."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = settings.debug
    context.execution_options.verbose_progress = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    if not settings.debug:
        for name in ("ray.data", "ray.train", "ray._private"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def workers_for(settings: WorkerRequest) -> Workers:
    """Processes of a pool: one per GPU share, or one per CPU, unless --workers says otherwise.

    The pool may grow as nodes join. With an autoscaler, all of --workers are requested at once. Raises
    ClusterError if the cluster can never provide them: an actor that cannot be placed would wait forever.
    """
    # of older autoscalers nothing is known: Ray Data asks them for a node at a time as long as a pool may grow
    grows = is_autoscaler_v2(fetch_from_server=True)
    return place(_nodes(), settings.gpus_per_worker, workers=settings.workers, grows=grows)


def workers_now(settings: WorkerRequest, most: int | None = None) -> Workers:
    """Like workers_for, but only what fits on the nodes now, and at most `most`: for groups that start together."""
    workers = min(filter(None, (settings.workers, most)), default=None)
    try:
        return place(_nodes(), settings.gpus_per_worker, workers=workers)
    except ClusterError:
        if not is_autoscaler_v2(fetch_from_server=True):
            raise
        return place([], settings.gpus_per_worker, workers=1, grows=True)


def check_placeable(workers: Workers) -> None:
    """Raise ClusterError if no node has room for such a worker, and the autoscaler has reported that none will."""
    try:
        place(_nodes(), workers.gpus)
    except ClusterError as error:
        asked = {"CPU": workers.cpus, "GPU": workers.gpus}
        if asked in [{name: bundle.get(name, 0.0) for name in asked} for bundle in _never_placed()]:
            raise ClusterError(f"{error}; its autoscaler has none to add") from None


def _never_placed() -> list[Resources]:
    """What processes ask for, of whichever job, that the autoscaler finds no room for on any node that it may add."""
    reply, gcs = GetClusterStatusReply(), GcsClient(ray.get_runtime_context().gcs_address)
    with contextlib.suppress(RpcError):  # it is asked again
        reply.ParseFromString(gcs.get_cluster_status(timeout_s=_STATUS_SECONDS))
    return [dict(request.resources_bundle) for request in reply.autoscaling_state.infeasible_resource_requests]


def check_room(each: int, workers: int, what: str) -> None:
    """As placement.check_memory, for the nodes of this cluster; whatever an autoscaler may add is not judged."""
    if not is_autoscaler_v2(fetch_from_server=True):
        check_memory(_nodes(), each, workers, what)


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
