"""The GPU command: five steps, each with a limit and a log of its own, and a table that is kept whatever happens.

Started by run.sh. gpu.json and gpu.md are written anew after every step; figures of a step that fails or runs out of
time are kept as far as it came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rows import ROOT, has, read_rows

from tests.support.processes import descendants, kill

RESULTS = ROOT / "tests" / "bench" / "results"
PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "ray", "faiss-cpu", "faiss-gpu", "numpy", "pillow")
NEEDED = ("faiss", "open_clip", "kornia", "webdataset", "safetensors", "skimage", "sklearn", "pyarrow", "fsspec")
TOTAL_S, REHEARSAL_S = 540.0, 1200.0
AT_ONCE = 2  # steps of a rehearsal, which measures nothing: one works while the other waits for Ray


@dataclass(frozen=True)
class Step:
    """One part of the command. limit_s is what it may take on a GPU; needs are modules beyond `pipeline`'s."""

    name: str
    title: str
    limit_s: float
    needs: tuple[str, ...] = ()


STEPS = (
    Step("gpu_tests", "Tests that need a GPU", 90, ("pytest",)),
    Step("main_job", "The main job, its stages and their limits", 180, ("ray",)),
    Step("universal", "One for All at full size", 110),
    Step("published", "Unlearnable Clusters as published", 40),
    Step("evaluation", "An evaluation", 120, ("ray",)),
)
RUNNING: set[subprocess.Popen[bytes]] = set()


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="every step, tiny, on CPUs: in a few minutes")
    parser.add_argument("--out", type=Path, help=f"folder for gpu.json, gpu.md and logs (default: {RESULTS})")
    parser.add_argument("--steps", default=",".join(step.name for step in STEPS), help="only these, by name")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with cifar10/")
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if not options.rehearse and not has_gpu():
        print("torch sees no GPU here; --rehearse runs everything tiny on CPUs", file=sys.stderr)
        return 2
    kept = options.out is not None or not options.rehearse  # a rehearsal leaves nothing in the repository
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-rehearsal-")) if options.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = about(options) | {"steps": []}
    spent = time.time() - float(os.environ.get("GPU_COMMAND_STARTED", time.time()))  # on what had to be installed
    until = time.monotonic() + (REHEARSAL_S if options.rehearse else TOTAL_S - spent)
    steps = [step for step in STEPS if step.name in options.steps.split(",")]
    for about_step in all_taken(steps, options, out, until):
        record["steps"].append(about_step)
        write(out, record)
    failed = [step["name"] for step in record["steps"] if step["status"] != "done"]
    print(f"\n{out / 'gpu.md' if kept else ''}\n{len(record['steps']) - len(failed)} passed, {len(failed)} failed")
    if not kept:
        print((out / "gpu.md").read_text())
        shutil.rmtree(out, ignore_errors=not failed)
    return 1 if failed else 0


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def all_taken(steps: Sequence[Step], options: argparse.Namespace, out: Path, until: float) -> Iterator[dict[str, Any]]:
    """Take the steps, in a rehearsal some of them at once; what `taken` says of each, in their order."""
    if not options.rehearse:
        yield from (taken(step, options, out, until) for step in steps)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            yield from pool.map(lambda step: taken(step, options, out, until), steps)
        finally:  # after Ctrl-C, of which the threads that wait for the steps see nothing
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                stop(process)


def taken(step: Step, options: argparse.Namespace, out: Path, until: float) -> dict[str, Any]:
    """Take one step: what became of it, and its figures."""
    missing = [module for module in step.needs if not has(module)]
    log, rows = out / f"{step.name}.log", out / f"{step.name}.rows"
    rows.unlink(missing_ok=True)
    print(f"{step.title} …", flush=True)
    started = time.monotonic()
    status = f"skipped: {', '.join(missing)} not installed" if missing else ""
    if not missing:
        limit = min(REHEARSAL_S if options.rehearse else step.limit_s, until - started)
        status = ended(step, options, log, rows, limit) if limit > 5 else "skipped: no time was left"
    seconds = round(time.monotonic() - started, 1)
    print(f"{step.title}: {status}, {seconds} s", flush=True)
    found = read_rows(rows)
    rows.unlink(missing_ok=True)
    return {"name": step.name, "title": step.title, "status": status, "seconds": seconds, "rows": found}


def ended(step: Step, options: argparse.Namespace, log: Path, rows: Path, limit: float) -> str:
    """Run a step in a process group of its own until it ends or its time is over; "done", or why not."""
    script = Path(__file__).with_name(f"{step.name}.py")
    with tempfile.TemporaryDirectory(prefix="g-", ignore_cleanup_errors=True) as work, log.open("w") as file:
        told = ["--device", "cpu" if options.rehearse else "cuda", "--work", work, "--rows", str(rows)]
        told += ["--data", str(options.data), "--cpus", str(options.cpus)] + (["--tiny"] if options.rehearse else [])
        process = subprocess.Popen(
            [sys.executable, str(script), *told],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": work, "HF_HUB_OFFLINE": "1"},
        )
        RUNNING.add(process)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after its {limit:.0f} s"
        finally:
            stop(process)
            RUNNING.discard(process)
    return "done" if code == 0 else f"failed: {last_line(log)}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the step and whatever of Ray it started, and nothing else."""
    below = descendants(process.pid) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        kill(child)
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:200] if lines else "it printed nothing"


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, driver, versions and commit."""
    import torch

    git = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False) if shutil.which("git") else None
    driver = ""
    if not options.rehearse and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": "none: a rehearsal on CPUs" if options.rehearse else torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cpus": options.cpus,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if is_installed(name)},
        "missing": [module for module in (*NEEDED, "ray") if not has(module)],
        "commit": commit.stdout.strip() if commit else "",
        "command": "tests/bench/gpu/run.sh " + " ".join(sys.argv[1:]),
    }


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def write(out: Path, record: dict[str, Any]) -> None:
    """gpu.json and gpu.md, each whole or not at all."""
    for name, text in (("gpu.json", json.dumps(record, indent=1) + "\n"), ("gpu.md", as_markdown(record))):
        half = out / f"{name}.half"
        half.write_text(text)
        half.rename(out / name)


def as_markdown(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"# On a GPU: {record['device']}",
        "",
        f"`{record['command'].strip()}` at commit {record['commit'] or 'unknown'}. {record['cpus']} CPUs, driver "
        f"{record['driver'] or 'none'}, CUDA {record['cuda']}, Python {record['python']}, {versions}."
        + (f" Not installed: {', '.join(record['missing'])}." if record["missing"] else ""),
    ]
    for step in record["steps"]:
        lines += ["", f"## {step['title']}: {step['status']}, {step['seconds']:.0f} s", ""]
        if step["rows"]:
            lines += ["| what | | unit | |", "| --- | ---: | --- | --- |"]
        for row in step["rows"]:
            value = f"{row['value']:,.4g}" if isinstance(row["value"], float) else f"{row['value']}"
            lines.append(f"| {row['what']} | {value} | {row['unit']} | {row['note']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
