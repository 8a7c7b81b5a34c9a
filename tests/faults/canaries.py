"""Runs whose secrets are known and looked for: an S3 server that really checks signatures, and all that a run shows."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pyarrow.parquet as pq
import s3fs

from tests.support import runs

EVERYTHING = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})


def forms(secret: bytes) -> dict[str, bytes]:
    """What a secret may look like in a file: as it is, quoted, in base64 at any offset, in hex, as numbers."""
    text = secret.decode("ascii")
    found = {"raw": secret, "quoted": quote(text, safe="").encode(), "hex": secret.hex().encode()}
    found["json"] = json.dumps(text)[1:-1].encode()
    found["numbers"] = str(list(secret))[1:-1].encode()
    found["packed numbers"] = ",".join(map(str, secret)).encode()
    found["floats"] = str([float(byte) for byte in secret])[1:-1].encode()
    found["packed floats"] = ",".join(str(float(byte)) for byte in secret).encode()
    found["numbers as words"] = json.dumps([str(byte) for byte in secret])[1:-1].encode()
    found["packed numbers as words"] = found["numbers as words"].replace(b" ", b"")
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + secret)
        found[f"base64 + {shift}"] = coded[4 if shift else 0 : -4]
        found[f"urlsafe base64 + {shift}"] = found[f"base64 + {shift}"].translate(bytes.maketrans(b"+/", b"-_"))
    return found


@dataclass(frozen=True)
class Server:
    """An S3 server, and the temporary credentials that it accepts."""

    url: str
    canaries: Mapping[str, str]  # variable -> value
    key_file: Path

    @property
    def environment(self) -> dict[str, str]:
        """That of a run: the credentials, and nothing of this machine's own."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        more = {"AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1"}
        # what a cluster with a history server turns on: Ray then writes down all that its parts were told
        return mine | more | self.canaries | {"RAY_enable_export_api_write": "1"}

    def filesystem(self) -> s3fs.S3FileSystem:
        key, secret, token = self.canaries.values()
        options = {"endpoint_url": self.url, "client_kwargs": {"region_name": "us-east-1"}}
        return s3fs.S3FileSystem(key=key, secret=secret, token=token, skip_instance_cache=True, **options)

    def needles(self) -> dict[str, bytes]:
        """Every form of every secret, by a name that gives nothing away."""
        values = {name: value.encode() for name, value in self.canaries.items()}
        values["key file"] = self.key_file.read_bytes()
        return {f"{name}, {how}": form for name, value in values.items() for how, form in forms(value).items()}

    def leaks(self, places: Mapping[str, bytes]) -> list[str]:
        """Where a secret is, and in which form."""
        needles = self.needles()
        return [
            f"{place}: {name}" for place, data in places.items() for name, needle in needles.items() if needle in data
        ]


def credentials(url: str) -> dict[str, str]:
    """Make a bucket and a role; from then on the server refuses whoever does not sign with what this returns."""
    setup: dict[str, Any] = {"endpoint_url": url, "region_name": "us-east-1"}
    setup |= {"aws_access_key_id": "setup", "aws_secret_access_key": "setup"}
    boto3.client("s3", **setup).create_bucket(Bucket="art")
    iam = boto3.client("iam", **setup)
    role = iam.create_role(RoleName="scumble", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    iam.put_role_policy(RoleName="scumble", PolicyName="all", PolicyDocument=EVERYTHING)
    given = boto3.client("sts", **setup).assume_role(RoleArn=role, RoleSessionName="tests")["Credentials"]
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", headers, method="POST")).close()
    names = {"AWS_ACCESS_KEY_ID": "AccessKeyId", "AWS_SECRET_ACCESS_KEY": "SecretAccessKey"}
    return {variable: given[name] for variable, name in (names | {"AWS_SESSION_TOKEN": "SessionToken"}).items()}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Kept:
    """While a run goes on, keeps by hard links every file that comes up below `folder`, and every command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder / "t", folder / "kept"
        self.folder.mkdir()
        self.kept.mkdir()
        self.lines: set[bytes] = set()
        self._seen: set[Path] = set()

    def look(self, parent: int) -> None:
        for path in files_below(self.folder):
            if path not in self._seen:
                self._seen.add(path)
                with contextlib.suppress(OSError):  # gone again
                    os.link(path, self.kept / f"{len(self._seen)}-{path.name}")
        for pid in [parent, *runs.descendants(parent)]:
            with contextlib.suppress(OSError):
                self.lines.add(Path(f"/proc/{pid}/cmdline").read_bytes())

    def places(self) -> dict[str, bytes]:
        return below(self.kept) | {f"command line {number}": line for number, line in enumerate(self.lines)}


def files_below(folder: Path) -> Iterator[Path]:
    """Every plain file below a folder; of a folder that goes away meanwhile, what was there."""
    for name, _, names in os.walk(folder):
        paths = (Path(name, each) for each in names)
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


def below(folder: Path) -> dict[str, bytes]:
    """What every file below a folder holds."""
    return {str(path): path.read_bytes() for path in files_below(folder)}


def stored(server: Server, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix; of Parquet also what it holds, because the file is compressed."""
    filesystem, found = server.filesystem(), {}
    for name in filesystem.find(prefix):
        found[name] = filesystem.cat_file(name)
        if name.endswith(".parquet"):
            with filesystem.open(name, "rb") as file:
                table = pq.read_table(file)
            found[f"{name}, read"] = f"{table.to_pylist()} {table.schema.metadata}".encode()
    return found


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str
    files: Mapping[str, bytes]  # what lay in its temporary folder and its home, and its processes' command lines

    def places(self) -> dict[str, bytes]:
        return {"stdout": self.stdout.encode(), "stderr": self.stderr.encode(), **self.files}


def run(server: Server, job: str, *options: str, **environment: str) -> Ran:
    """Run a job to its end, with a home and a temporary folder of its own that are looked at all the time."""
    with scratch() as folder:
        kept = Kept(folder)
        (folder / "home").mkdir()
        places = {"TMPDIR": str(kept.folder), "HOME": str(folder / "home")}
        command = [sys.executable, str(runs.ROOT / "jobs" / job), *options]
        outputs = [folder / "stdout", folder / "stderr"]
        with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
            given = server.environment | places | environment
            process = subprocess.Popen(command, env=given, stdout=stdout, stderr=stderr, start_new_session=True)
        deadline = time.monotonic() + 550
        try:
            while process.poll() is None:
                kept.look(process.pid)
                assert time.monotonic() < deadline, outputs[1].read_text()[-2000:]
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                runs.kill_tree(process)
        texts = [path.read_text() for path in outputs]
        return Ran(process.returncode, *texts, kept.places() | below(folder / "home"))
