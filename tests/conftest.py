"""What the tests share: real data where it is there, object stores that really answer."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pipeline.storage.store import Store
from tests.support.data import set_at_hand

if TYPE_CHECKING:
    from tests.support.uploads import Job


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup, and what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses a bucket is marked s3: `make test-all` runs it again, on a real server.

    Those that are skipped for want of a user who is refused something can be run without root's right to it.
    """
    for item in items:
        if item.get_closest_marker("permissions") and _may_read_everything():
            item.add_marker(
                pytest.mark.skip(reason="root reads everything; `make test` runs it again without that right")
            )
        if {"bucket", "s3_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.s3)


def _may_read_everything() -> bool:
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0)
        return os.access(file.name, os.R_OK)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> None:
    """Tests share a machine, and so do fixtures: threads of several processes would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are the same whatever a test before has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ray_folder() -> None:
    """Ray's `Cluster` writes its address there, wherever else its files are, and expects the folder."""
    if importlib.util.find_spec("ray") is None:  # tests/gpu needs none of it
        return
    from ray._common.utils import get_default_ray_temp_dir

    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def native_uploads() -> Path:
    """Folder of files as people upload them, broken ones too; without it the test is skipped."""
    return set_at_hand("native")


@pytest.fixture(scope="session")
def imagenette() -> Path:
    """Folder of the Imagenette shards; without it the test is skipped."""
    return set_at_hand("imagenette")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server of this session, with credentials in the environment as s3fs finds them."""
    if "SCUMBLE_TEST_S3" in os.environ:  # a real server that the caller has started and whose keys are set
        yield os.environ["AWS_ENDPOINT_URL"]
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    mine = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    yield mine["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def s3_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has the stores of this process ask at an endpoint; both of its names count, and the second goes first."""
    import s3fs

    def ask_at(url: str) -> None:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, url)
        s3fs.S3FileSystem.clear_instance_cache()

    yield ask_at
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def lenient_s3(s3_server: str) -> None:
    """For tests of what no real server here can do: take a request whose path was changed, or archive an object."""
    if "SCUMBLE_TEST_S3" in os.environ:
        pytest.skip("the real server checks signatures and has no archive; `make test` runs this on the one in process")


@pytest.fixture
def bucket(s3_server: str) -> str:
    """URL of a bucket that only this test uses."""
    import s3fs

    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store: a folder, or a prefix in a bucket."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    return Store(request.getfixturevalue("bucket") + "/prefix")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The command over new uploads, from one folder to another."""
    from tests.support.uploads import Job  # and with it a job: tests/gpu has no need of it

    return Job.local(tmp_path, monkeypatch)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> Job:
    """The same from one prefix of a bucket to another."""
    from tests.support.uploads import Job

    return Job(tmp_path, source=Store(f"{bucket}/in"), output=Store(f"{bucket}/out"), monkeypatch=monkeypatch)
