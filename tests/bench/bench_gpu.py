"""Speed of the stages `embed` and `apply` on a GPU, beside what limits them:  python tests/bench/bench_gpu.py

Needs `pipeline` and what it imports, no Ray and no store: shards lie in memory (/dev/shm). Images: crops of real
photographs, JPEGs of quality 90 with a label beside each. The surrogate is ViT-B-32 with random weights, which costs
what the real ones cost. Processes of one row start together, after a warm-up; a round lasts from the first start to
the last end; the median round counts. `embed` runs as 1, 2 and 4 processes that share the GPU and the CPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_work import SURROGATE, Apply, Bench, Codec, Decode, Embed, Work, stream_samples
from photo_shards import QUALITY, samples

from pipeline.picture import decode_rgb
from pipeline.pretrained import build
from pipeline.surrogate import Surrogate, load_surrogate
from pipeline.tar import ShardWriter

RESULTS = Path(__file__).parent / "results"
PATIENCE_S = 300.0  # for the slowest process to be ready
MODEL_BATCHES = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Rate:
    """One row: images per second over the rounds."""

    what: str
    processes: int
    threads: int  # of each process
    images: int  # per round
    median: float
    low: float
    high: float
    notes: dict[str, float]


def one_process(
    make: Callable[[Bench, int, Sequence[Path]], Work],
    bench: Bench,
    threads: int,
    paths: Sequence[Path],
    barrier: Any,
) -> tuple[list[tuple[float, float, int]], dict[str, float]]:
    """(start, end, images) of every round, on the clock that all processes share, and the work's notes."""
    torch.set_num_threads(threads)
    rounds = []
    with ExitStack() as stack:
        stack.push(partial(give_up, barrier))
        work = make(bench, threads, paths)
        work(paths[:1])
        warm_up = work.notes()
        for _ in range(bench.rounds):
            barrier.wait(PATIENCE_S)
            start = time.monotonic()
            images = work(paths)
            rounds.append((start, time.monotonic(), images))
    return rounds, {name: spent - warm_up[name] for name, spent in work.notes().items()}


def give_up(barrier: Any, kind: Any, error: BaseException | None, trace: Any) -> None:
    """A process that fails says why, and the others do not wait for it."""
    if error is not None:
        print(f"  failed: {error!r}", flush=True)
        barrier.abort()


def rate(
    what: str,
    make: Callable[[Bench, int, Sequence[Path]], Work],
    bench: Bench,
    *,
    processes: int,
    threads: int,
) -> Rate:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        barrier = manager.Barrier(processes)
        jobs = [(make, bench, threads, bench.paths[number::processes], barrier) for number in range(processes)]
        found = pool.starmap(one_process, jobs, chunksize=1)
    rates = []
    for together in zip(*(rounds for rounds, _ in found), strict=True):
        starts, ends, images = zip(*together, strict=True)
        rates.append(sum(images) / (max(ends) - min(starts)))
    notes = {name: round(sum(notes[name] for _, notes in found), 3) for name in found[0][1]}
    done = Rate(what, processes, threads, sum(images), statistics.median(rates), min(rates), max(rates), notes)
    print(as_text(done), flush=True)
    return done


def model_alone(bench: Bench) -> tuple[list[Rate], dict[str, float]]:
    """The surrogate on tensors that lie on the device, and what happens between pixels and tensor; and its checks."""
    surrogate = load_surrogate(SURROGATE, weights=None, size=None, device=bench.device)
    decode = partial(decode_rgb, at_least=surrogate.resize, max_pixels=10**8, suffix="jpg")
    pictures = [decode(sample.members["jpg"]) for sample in islice(stream_samples(bench.paths[0]), bench.batch_size)]
    images = surrogate.prepare(pictures)
    network = build(SURROGATE, weights=None, size=None).network.to(bench.device, torch.bfloat16)
    rows = []
    for batch in MODEL_BATCHES:
        if batch > 4 * bench.batch_size:
            continue
        resident = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        half = resident.to(torch.bfloat16)
        rows.append(on_device("model, all bf16, resident", batch, bench, partial(network, half)))
        rows.append(on_device("model as embed runs it, resident", batch, bench, partial(embedded, surrogate, resident)))
    rows.append(on_device("pixels to device, resize", len(pictures), bench, partial(surrogate.prepare, pictures)))
    return rows, checks(surrogate, pictures, images)


def embedded(surrogate: Surrogate, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
        return surrogate.embed(images)


def on_device(what: str, batch: int, bench: Bench, run: Callable[[], Any]) -> Rate:
    """Rounds of repeated calls between two synchronisations, after a warm-up of as many calls."""
    synchronise = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    calls = 20 if bench.device == "cuda" else 1
    rates = []
    with torch.inference_mode():
        for _ in range(max(3, bench.rounds) + 1):
            synchronise()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            synchronise()
            rates.append(calls * batch / (time.perf_counter() - start))
    rates = rates[1:]
    done = Rate(f"{what}, batch {batch}", 1, 1, calls * batch, statistics.median(rates), min(rates), max(rates), {})
    print(as_text(done), flush=True)
    return done


def checks(surrogate: Surrogate, pictures: Sequence[np.ndarray[Any, Any]], images: torch.Tensor) -> dict[str, float]:
    """Features as the stage makes them against float32 ones, and against themselves."""
    first, second = surrogate.embed_pictures(pictures), surrogate.embed_pictures(pictures)
    with torch.inference_mode():
        exact = surrogate.embed(images).cpu().numpy()
    cosine = (first * exact).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(exact, axis=1)
    found = {"least_cosine_to_float32": float(cosine.min()), "two_runs_bit_equal": float((first == second).all())}
    if found["least_cosine_to_float32"] <= 0.99 or not found["two_runs_bit_equal"]:
        raise RuntimeError(f"the features are wrong: {found}")
    return found


def write_shard(path: Path, number: int, count: int, width: int, height: int) -> Path:
    with ShardWriter(path, compressed=False) as writer:
        for sample in samples(count, width, height, seed=number):
            writer.write(sample)
    return path


def write_shards(folder: Path, cpus: int, per_shard: int, width: int, height: int) -> tuple[Path, ...]:
    """One shard of different images per CPU."""
    jobs = [(folder / f"shard-{n:06d}.tar", n, per_shard, width, height) for n in range(cpus)]
    with multiprocessing.get_context("spawn").Pool(cpus) as pool:
        return tuple(pool.starmap(write_shard, jobs, chunksize=1))


def measure(bench: Bench, cpus: int) -> tuple[list[Rate], dict[str, float]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows, checked = pool.apply(model_alone, (bench,))
    rows.append(rate("decode alone, threads", Decode, bench, processes=1, threads=cpus))
    rows.append(rate("decode alone, processes", Decode, bench, processes=cpus, threads=1))
    for processes in (1, 2, 4):
        if processes <= cpus:
            rows.append(rate("embed, whole stage", Embed, bench, processes=processes, threads=cpus // processes))
    rows.append(rate("codec alone, decode + encode", Codec, bench, processes=cpus, threads=1))
    rows.append(rate("apply, whole stage", Apply, bench, processes=cpus, threads=1))
    return rows, checked


def ratios(rows: Sequence[Rate]) -> dict[str, float]:
    """Each stage against the slowest of its parts alone."""

    def best(start: str) -> float:
        return max(row.median for row in rows if row.what.startswith(start))

    limit = min(best("decode alone"), best("model as embed runs it"))
    return {
        "embed to the slower of decode and model": round(best("embed,") / limit, 3),
        "embed to model alone": round(best("embed,") / best("model as embed runs it"), 3),
        "apply to codec alone": round(best("apply,") / best("codec alone"), 3),
    }


def where(device: str, cpus: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    packages = ("torch", "torchvision", "open_clip_torch", "pillow", "numpy")
    return {
        "device": name,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cpus": cpus,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": commit,
        "command": "python tests/bench/bench_gpu.py " + " ".join(sys.argv[1:]),
    }


def as_text(row: Rate) -> str:
    return (
        f"  {row.what:48} {row.processes:3} x {row.threads:3} "
        f"{row.median:10.1f} images/s  [{row.low:.1f}, {row.high:.1f}]  {row.notes or ''}"
    )


def as_markdown(record: dict[str, Any], rows: Sequence[Rate]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"# embed and apply on {record['device']}",
        "",
        f"`{record['command'].strip()}`, commit {record['commit'] or 'unknown'}: {record['cpus']} CPUs, "
        f"Python {record['python']}, {versions}. {SURROGATE}, {record['images']} JPEGs of {record['size']}, "
        f"quality {QUALITY}. Median of the rounds [least, most].",
        "",
        "| what | processes x threads | images/s |",
        "| --- | --- | --- |",
        *(
            f"| {row.what} | {row.processes} x {row.threads} | {row.median:,.0f} [{row.low:,.0f}, {row.high:,.0f}] |"
            for row in rows
        ),
        "",
        *(f"- {what}: {value:.4g}" for what, value in {**record["ratios"], **record["checks"]}.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--batch-size", type=int, help="pictures that the surrogate sees at once (256, CPU: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, help=f"folder for gpu.json and gpu.md (with a GPU: {RESULTS})")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu tries the bench out without recording anything")
    per_shard = max(1, options.images // options.cpus)
    batch_size = options.batch_size or {"cuda": 256, "cpu": 32}[options.device]
    input_size = build(SURROGATE, weights=None, size=None).preprocessing.resize
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        paths = write_shards(folder, options.cpus, per_shard, options.width, options.height)
        sides = (options.width, options.height)
        bench = Bench(options.device, paths, per_shard, *sides, batch_size, options.rounds, input_size)
        rows, checked = measure(bench, options.cpus)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = where(options.device, options.cpus) | {"surrogate": SURROGATE, "batch_size": batch_size}
    record |= {"images": per_shard * options.cpus, "size": f"{options.width}x{options.height}"}
    record |= {"ratios": ratios(rows), "checks": checked}
    markdown = as_markdown(record, rows)
    print("\n" + markdown)
    results = options.results or (RESULTS if options.device == "cuda" else None)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / "gpu.json").write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        (results / "gpu.md").write_text(markdown)


if __name__ == "__main__":
    main()
