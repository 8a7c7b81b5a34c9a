"""The GPU command without a GPU: its rehearsal, a table that outlives its steps, wheels that are cut up and joined."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.runs import ROOT

FOLDER = ROOT / "tests" / "bench" / "gpu"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the command as a module; it finds its neighbours as when it is started."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_wheels_are_cut_into_parts_and_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("wheels", monkeypatch)
    monkeypatch.setattr(wheels, "WHEELS", tmp_path / "wheels")
    contents = {"large-1-py3.whl": os.urandom(2500), "middle-1-py3.whl": os.urandom(600), "small-1-py3.whl": b"x" * 350}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    sizes = wheels.lay_out([tmp_path / name for name in contents], 1000)
    assert max(sizes) <= 1000
    assert [
        sum(f.stat().st_size for f in (tmp_path / f"wheels/part-{n}").iterdir()) for n in range(len(sizes))
    ] == sizes
    (tmp_path / "whole").mkdir()
    assert {path.name: path.read_bytes() for path in wheels.joined(tmp_path / "whole")} == contents


def test_what_is_installed_is_not_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("wheels", monkeypatch)
    assert wheels.is_here(Path("numpy-1.0-cp312.whl"))
    assert not wheels.is_here(Path("no_such_package-1.0-py3.whl"))


def test_all_that_the_project_asks_for_is_gathered_but_what_torch_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("wheels", monkeypatch)
    lacking = wheels.closure("scumble", *wheels.TOOLS) - wheels.closure(*wheels.IN_THE_IMAGE)
    assert {"ray", "open-clip-torch", "faiss-cpu", "webdataset", "s3fs", "aiobotocore", "msgpack", "idna"} <= lacking
    assert not lacking & {"torch", "numpy", "pillow", "torchvision"}


def test_a_step_that_is_stopped_keeps_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script("command", monkeypatch)
    (tmp_path / "slow.py").write_text(
        "import time\nfrom rows import told\ntold().row('before', 1.5, 's')\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), str(ROOT)]))
    monkeypatch.setattr(command, "__file__", str(tmp_path / "command.py"))
    monkeypatch.setattr(command, "REHEARSAL_S", 6.0)
    options = argparse.Namespace(rehearse=True, data=tmp_path, cpus=1)
    step = command.taken(command.Step("slow", "Slow", 6), options, tmp_path, time.monotonic() + 60)
    assert step["status"] == "stopped after its 6 s"
    assert step["rows"] == [{"what": "before", "value": 1.5, "unit": "s", "note": ""}]


def test_without_a_gpu_it_says_so() -> None:
    here = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([FOLDER / "run.sh"], env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "torch sees no GPU here; --rehearse runs everything tiny on CPUs\n"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_the_rehearsal_takes_every_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [FOLDER / "run.sh", "--rehearse", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {step["name"]: step["status"] for step in steps} == dict.fromkeys(
        ("gpu_tests", "main_job", "universal", "published", "evaluation"), "done"
    ), done.stdout
    assert done.returncode == 0
    assert all(step["rows"] for step in steps)
