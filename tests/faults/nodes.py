"""A Ray cluster of several nodes on this machine, each in a network of its own: one can be cut off, or killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.kills import Family
from tests.support import runs
from tests.support.samples import free_port

RAY = str(Path(sys.executable).with_name("ray"))
# the kernel takes down a namespace and its devices some time after it is told to: no cluster takes another's names
CLUSTERS = itertools.count()


class Nodes:
    """A head without CPUs on the host, and nodes of one CPU each in network namespaces behind a bridge."""

    def __init__(self, count: int) -> None:
        number = next(CLUSTERS)
        rng = Random(f"{os.getpid()}-{number}")
        self._tag = f"sc{os.getpid() % 16**6:06x}{number:02x}"  # a device's name has at most 15 characters
        self._net = f"10.{rng.randrange(64, 250)}.{rng.randrange(250)}"
        self._folder = tempfile.mkdtemp(prefix="ray-")
        self._count = count
        self._families: dict[str, Family] = {}
        self.address = f"{self._net}.1:{free_port()}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self) -> None:
        """Networks, head, nodes. Skips where networks cannot be made."""
        try:
            self._ip("link", "add", self._tag, "type", "bridge")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no networks can be made here: {error}")
        self._ip("addr", "add", f"{self._net}.1/24", "dev", self._tag)
        self._ip("link", "set", self._tag, "up")
        port = self.address.rpartition(":")[2]
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self._folder}"]
        self._ray("head", f"{self._net}.1", head)
        for number in range(1, self._count + 1):
            self._network(number)
            self._ray(f"node{number}", f"{self._net}.{10 + number}", [f"--address={self.address}", "--num-cpus=1"])
        self._wait_for_nodes()

    def cut(self, number: int) -> None:
        """Nothing reaches the node, and nothing leaves it."""
        self._ip("link", "set", f"{self._tag}v{number}", "down")

    def mend(self, number: int) -> None:
        self._ip("link", "set", f"{self._tag}v{number}", "up")

    def kill(self, name: str, words: str = "") -> None:
        """SIGKILL a node's processes: those whose command line holds `words`, or all."""
        family = self._families[name]
        family.look()
        living = family.living()
        for pid in runs.named(living, words) if words else living:
            runs.kill(pid)

    def processes(self, name: str, words: str) -> list[int]:
        """Pids of a node."""
        self._families[name].look()
        return runs.named(self._families[name].living(), words)

    def stop(self) -> None:
        for family in self._families.values():
            family.look()
            family.bury()
        for number in range(1, self._count + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", f"{self._tag}n{number}")
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", self._tag)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _network(self, number: int) -> None:
        space, ours, theirs = f"{self._tag}n{number}", f"{self._tag}v{number}", f"{self._tag}w{number}"
        self._ip("netns", "add", space)
        self._ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        self._ip("link", "set", theirs, "netns", space)
        self._ip("link", "set", ours, "master", self._tag)
        self._ip("link", "set", ours, "up")
        self._ip("-n", space, "addr", "add", f"{self._net}.{10 + number}/24", "dev", theirs)
        for device in ("lo", theirs):
            self._ip("-n", space, "link", "set", device, "up")

    def _ray(self, name: str, address: str, options: list[str]) -> None:
        inside = [] if name == "head" else ["ip", "netns", "exec", f"{self._tag}n{name.removeprefix('node')}"]
        command = [*inside, RAY, "start", *options, f"--node-ip-address={address}", "--block"]
        memory = ["--object-store-memory=200000000", "--disable-usage-stats"]
        log = Path(self._folder) / f"{name}.log"
        with log.open("wb") as out:
            environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
            process = subprocess.Popen(
                [*command, *memory], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        self._families[name] = Family(process)
        until = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)

    def _wait_for_nodes(self) -> None:
        """Until the head knows all CPUs."""
        ask = f"import ray; ray.init(address={self.address!r}, logging_level='ERROR'); print(ray.cluster_resources())"
        until = time.monotonic() + 60
        seen = ""
        while f"'CPU': {self._count:.1f}" not in seen:
            assert time.monotonic() < until, f"the head knows {seen}"
            seen = subprocess.run(
                [sys.executable, "-c", ask], env=self.environment, capture_output=True, text=True, check=False
            ).stdout

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A cluster for a while."""
    made = Nodes(count)
    try:
        made.start()
        yield made
    finally:
        made.stop()
