"""Credentials and keys are seen nowhere: not in output, records, logs, command lines, nor what Ray shows of itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pytest
from botocore.exceptions import BotoCoreError

from tests.faults.canaries import Ran, Server, below, credentials, forms, run, scratch, stored
from tests.support import runs
from tests.support.samples import free_port
from tests.support.uploads import jpeg

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

SURROGATE = ["--surrogate", "timm:tf_efficientnet_lite0"]  # its weights are part of the package
TEXTURE = [*SURROGATE, *("--surrogate-size", "64", "--clusters", "4")]
TEXTURE += [*("--generator", "texture", "--restarts", "4", "--max-quarantine", "1")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a small collection at s3://art/in and four loose images at s3://art/new."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "key").write_text(secrets.token_urlsafe(32))
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                found = Server(url, credentials(url), folder / "key")
                break
            except BotoCoreError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
        runs.write_collection(folder / "in", shards=2, per_shard=12)
        filesystem = found.filesystem()
        for path in (folder / "in").iterdir():
            filesystem.put_file(str(path), f"art/in/{path.name}")
        for number in range(4):
            filesystem.pipe_file(f"art/new/{number}.jpg", jpeg(number))
        yield found
    finally:
        process.terminate()
        process.wait(30)


def test_a_secret_would_be_found_in_every_form(server: Server) -> None:
    assert len(server.needles()) == 4 * len(forms(b"abc"))
    secret = server.canaries["AWS_SECRET_ACCESS_KEY"]
    planted = {
        "plain": f"x{secret}x".encode(),
        "url": f"https://a/?k={quote(secret, safe='')}".encode(),
        "base64": base64.b64encode(f"Basic {secret} and more".encode()),
        "numbers": json.dumps({"args": list(secret.encode())}).encode(),
        "floats": json.dumps([float(byte) for byte in secret.encode()]).encode(),
        "words": json.dumps({"args": [str(byte) for byte in secret.encode()]}).encode(),
        "innocent": secret[:20].encode(),
    }
    assert {leak.partition(":")[0] for leak in server.leaks(planted)} == set(planted) - {"innocent"}


def test_the_server_accepts_these_credentials_alone(server: Server) -> None:
    assert server.filesystem().exists("art/in/photos-000.tar")
    with pytest.raises(PermissionError):
        Server(server.url, server.canaries | {"AWS_SECRET_ACCESS_KEY": "x" * 40}, server.key_file).filesystem().ls(
            "art"
        )


# --- a private cluster ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def textured(server: Server) -> Ran:
    """A run with a key, from bucket to bucket, that says all it can say."""
    places = ["--input", "s3://art/in", "--output", "s3://art/textured", "--key-file", str(server.key_file)]
    return run(server, "protect_imagenet.py", *places, *TEXTURE, "--debug")


def test_a_run_from_bucket_to_bucket_shows_no_secret_anywhere(server: Server, textured: Ran) -> None:
    assert textured.code == 0, textured.stderr[-2000:]
    assert server.leaks(textured.places()) == []
    written = stored(server, "art/textured")
    assert {f"art/textured/{name}" for name in ("_scumble/run.json", "_scumble/report.html", "photos-000.tar")} <= set(
        written
    )
    assert server.leaks(written) == []
    for part in ("raylet", "gcs_server", "worker-", "ray-data", "EXPORT_DATASET_METADATA"):
        assert any(part in name for name in textured.files), f"Ray's logs were not seen: {part}"
    assert any(b"protect_imagenet.py" in line for name, line in textured.files.items() if name.startswith("command"))


@pytest.mark.parametrize("spread", [[], ["--ray"]], ids=["alone", "ray"])
def test_new_uploads_show_no_secret_anywhere(server: Server, textured: Ran, spread: list[str]) -> None:
    output, protection = f"art/safe{len(spread)}", "s3://art/textured/_scumble/protection.safetensors"
    places = ["--input", "s3://art/new", "--output", f"s3://{output}", "--protection", protection, "--settle", "0"]
    done = run(server, "protect_uploads.py", *places, "--key-file", str(server.key_file), "--debug", *spread)
    assert done.code == 0, done.stderr[-2000:]
    written = stored(server, output)
    assert {f"{output}/{number}.jpg" for number in range(4)} < set(written)
    assert server.leaks(done.places() | written) == []


REFUSED = {
    "protect_imagenet.py": ["--input", "s3://art/in", "--output", "s3://art/no", *runs.SMALL],
    "protect_uploads.py": [
        "--input",
        "s3://art/new",
        "--output",
        "s3://art/no",
        "--protection",
        "s3://art/p.safetensors",
    ],
    "doctor.py": ["--input", "s3://art/in", "--output", "s3://art/no", *SURROGATE],
}


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["quiet", "debug"])
@pytest.mark.parametrize("job", REFUSED)
def test_a_refused_secret_is_one_line_without_it(server: Server, job: str, debug: list[str]) -> None:
    wrong = secrets.token_urlsafe(30)
    mistaken = replace(server, canaries={**server.canaries, "AWS_SECRET_ACCESS_KEY": wrong})
    done = run(mistaken, job, *REFUSED[job], *debug)
    assert done.code == 1
    assert server.leaks(done.places()) == mistaken.leaks(done.places()) == []
    if job == "doctor.py":
        errors = [line for line in done.stdout.splitlines() if line.startswith("error")]
        assert [line.split()[1] for line in errors] == ["input", "output"]
        assert "Traceback" not in done.stdout + done.stderr
    else:
        errors = done.stderr.splitlines()
        assert errors[-1].startswith("error: cannot ")
        assert "access denied" in errors[-1]
        assert len(errors) == 1 or debug


# --- a cluster with a dashboard ------------------------------------------------------------------------------------

PAGES = ["/api/jobs/", "/logical/actors", "/nodes?view=summary", "/nodes?view=details", "/api/v0/cluster_metadata"]
PAGES += [f"/api/v0/{what}?detail=1&limit=10000" for what in ("jobs", "actors", "tasks", "workers", "nodes", "objects")]
PAGES += [f"/api/v0/{what}?detail=1&limit=10000" for what in ("placement_groups", "runtime_envs", "cluster_events")]
PAGES += ["/api/v0/tasks/summarize", "/api/v0/actors/summarize", "/api/v0/tasks/timeline", "/api/cluster_status"]
PAGES += ["/events", "/api/component_activities", "/api/train/v2/runs/v1", "/api/version"]


@dataclass(frozen=True)
class Cluster:
    """A head with a dashboard, started with the credentials in its environment, as a pod has them from a Secret."""

    address: str
    dashboard: str
    metrics: str

    def pages(self, *jobs: str) -> dict[str, bytes]:
        """What the dashboard answers now; pages that it has not are left out."""
        found: dict[str, bytes] = {}
        more = [f"/api/jobs/{job}{rest}" for job in jobs for rest in ("", "/logs")]
        more += [f"/api/data/datasets/{number:02d}000000" for number in range(1, 4)]
        for path in [*PAGES, *more]:
            self._get(found, self.dashboard + path)
        for node in json.loads(found[self.dashboard + "/nodes?view=summary"])["data"]["summary"]:
            identity = node["raylet"]["nodeId"]
            self._get(found, f"{self.dashboard}/nodes/{identity}")
            self._get(found, f"{self.dashboard}/api/v0/logs?node_id={identity}")
        self._get(found, self.metrics)
        return found

    def _get(self, found: dict[str, bytes], url: str) -> None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as answer:
            found[url] = answer.read()


def started(folder: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Cluster]:
    """A head that answers; a busy machine may need more than the 30 s that Ray gives itself, so it is tried again."""
    for attempt in range(4):
        ports = [free_port() for _ in range(6)]  # none may be the default of another cluster here
        options = ["--head", "--block", "--num-cpus=2", "--include-dashboard=true", "--disable-usage-stats"]
        options += [f"--temp-dir={folder / 'ray'}", "--object-store-memory=300000000"]
        names = ("port", "dashboard-port", "metrics-export-port", "ray-client-server-port")
        names += ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        options += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        with (folder / f"ray-{attempt}.log").open("w") as log:
            process = subprocess.Popen(
                [RAY, "start", *options], env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        while process.poll() is None:
            with contextlib.suppress(OSError, KeyError):
                address = (folder / "ray/ray_current_cluster").read_text().strip()
                found = Cluster(address, f"http://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics")
                if json.loads(found.pages()[f"{found.dashboard}/nodes?view=summary"])["data"]["summary"]:
                    return process, found
            time.sleep(1)
        (folder / "ray/ray_current_cluster").unlink(missing_ok=True)
    raise AssertionError((folder / "ray-3.log").read_text())


@contextlib.contextmanager
def cluster(folder: Path, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """A Ray cluster of this test alone."""
    process, found = started(folder, environment)
    try:
        yield found
    finally:
        runs.kill_tree(process)  # type: ignore[arg-type]


RAY = str(Path(sys.executable).parent / "ray")


def submitted(
    command: list[str], environment: Mapping[str, str], folder: Path, ray: Cluster
) -> tuple[dict[str, bytes], str, int]:
    """What the dashboard showed while a job ran, what the job said, and its exit code."""
    seen: dict[str, bytes] = {}
    log = folder / "submit.log"
    for _ in range(20):
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
        try:
            while process.poll() is None:
                seen |= {f"{url} after {len(seen)}": page for url, page in ray.pages("scumble").items()}
                time.sleep(5)
        finally:
            process.kill()
            process.wait()
        if "No available agent" not in log.read_text():  # a young cluster asks to be tried again
            break
    return seen | ray.pages("scumble"), log.read_text(), process.returncode


def test_a_cluster_and_its_dashboard_show_no_secret_of_a_run(server: Server) -> None:
    places = ["--input", "s3://art/in", "--output", "s3://art/clustered"]
    job = [
        sys.executable,
        str(runs.ROOT / "jobs/protect_imagenet.py"),
        *places,
        *runs.SMALL,
        *runs.ONE_WORKER,
        "--debug",
    ]
    with scratch() as folder:
        (folder / "home").mkdir()
        mine = {"RAY_AUTH_MODE": "disabled", "HOME": str(folder / "home"), "RAY_USAGE_STATS_ENABLED": "0"}
        environment = server.environment | mine
        with cluster(folder, environment) as ray:
            submit = [RAY, "job", "submit", "--address", ray.dashboard, "--submission-id", "scumble", "--", *job]
            seen, said, code = submitted(submit, environment, folder, ray)
            assert code == 0, said[-3000:]
            asked = {"RAY_ADDRESS": ray.address, "RAY_AUTH_MODE": "disabled"}
            doctor = run(server, "doctor.py", "--input", "s3://art/in", "--debug", **asked)
            assert "1 nodes, 2 CPUs" in doctor.stdout
        everything = b"".join(seen.values())
        for word in (b"MapWorker(MapBatches(Protector))", b"RayTrainWorker", b"scumble", b"runtime_env"):
            assert word in everything, f"the dashboard was not seen at work: {word!r}"
        files = below(folder)
        assert any("EXPORT_DATASET_METADATA" in name for name in files)
        assert server.leaks(seen) == []
        assert server.leaks(files | doctor.places()) == []
        assert server.leaks(stored(server, "art/clustered")) == []
