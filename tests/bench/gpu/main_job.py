"""Step 2: the main job as a user runs it, images per second of every stage, and what limits each."""

from __future__ import annotations

import json
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rows import BENCH, Task, job, run, told

sys.path.insert(0, str(BENCH))
from photo_shards import crops, samples  # noqa: E402

from pipeline.profile import ProfileRecord, WorkerShares  # noqa: E402
from pipeline.records import Sample  # noqa: E402
from pipeline.settings import EMBEDDED_SURROGATE  # noqa: E402
from pipeline.shards.tar import ShardWriter  # noqa: E402

SIZES = ((500, 375), (375, 500), (640, 480), (500, 333), (1024, 768))
CLIP = "open_clip:ViT-B-32/openai"
# of a rehearsal: training the proxy takes its time, and the tests of step 1 train one
TINY_FIT = ("--workers", "1", "--generator", "direct", "--optimise-through", "surrogate")


@dataclass(frozen=True)
class Size:
    """How much is done: shards, images in each, different pictures of each of SIZES, and the fit."""

    shards: int
    per_shard: int
    distinct: int
    batch: int
    calls: int
    fit: tuple[str, ...]


FULL = Size(20, 500, 64, 256, 20, ("--fit-images", "4000"))  # what is measured is the rate
TINY = Size(2, 12, 2, 4, 1, ("--clusters", "2", "--steps", "1", "--restarts", "2", "--batch-size", "4"))


def main() -> None:
    task = told()
    size = TINY if task.tiny else FULL
    with task.timed(f"write {size.shards * size.per_shard:,} JPEGs of {len(SIZES)} sizes"):
        write_shards(task, size)
    clip = [*("--surrogate", CLIP), *("--surrogate-weights", str(random_weights(task)))]
    built_in = ["--surrogate", EMBEDDED_SURROGATE, *(("--surrogate-size", "64") if task.tiny else ())]
    limits(task, size, "lite", built_in)  # first: they take seconds, and the runs below may be cut off
    if not task.tiny:
        limits(task, size, "clip", clip)
    protect(task, size, "clip", task.gpu_options, [*clip, *size.fit, *(TINY_FIT if task.tiny else ())])
    fitted = ["--protection", str(task.work / "clip/_scumble/protection.safetensors")]
    if task.device == "cuda":
        protect(task, size, "half", ["--gpus-per-worker", "0.5"], [*clip, *fitted])
    if not task.tiny:
        protect(task, size, "lite", task.gpu_options, [*built_in, *size.fit])


def write_shards(task: Task, size: Size) -> None:
    """Pictures of several sizes, different ones made once and repeated under new keys."""
    folder = task.work / "in"
    folder.mkdir()
    with ProcessPoolExecutor(task.cpus, mp_context=get_context("spawn")) as pool:
        made = [
            one
            for part in pool.map(made_files, [(index, size.distinct) for index in range(len(SIZES))])
            for one in part
        ]
        jobs = [(folder / f"shard-{number:05d}.tar", number, size.per_shard, made) for number in range(size.shards)]
        list(pool.map(write_shard, jobs))


def made_files(asked: tuple[int, int]) -> list[bytes]:
    index, count = asked
    return [sample.members["jpg"] for sample in samples(count, *SIZES[index], seed=index)]


def write_shard(asked: tuple[Path, int, int, list[bytes]]) -> None:
    path, shard, count, made = asked
    with ShardWriter(path, compressed=False) as writer:
        for number in range(count):
            data = made[(shard * count + number) * 7 % len(made)]
            writer.write(Sample(f"{shard:05d}/{number:05d}", {"jpg": data, "cls": str(number % 10).encode()}))


def random_weights(task: Task) -> Path:
    """A file of the size and form of ViT-B-32's weights."""
    import open_clip
    from safetensors.torch import save_file

    path = task.work / "clip.safetensors"
    save_file(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).state_dict(), path)
    return path


def protect(task: Task, size: Size, name: str, gpu: list[str], options: list[str]) -> None:
    """One run with --profile, verified; the rates of its stages."""
    output, images = task.work / name, size.shards * size.per_shard
    where = ["--input", str(task.work / "in"), "--output", str(output)]
    with task.timed(f"{name}: {' '.join(gpu) or 'CPUs'}, command to end"):
        run(job("protect_imagenet", *where, *gpu, *options, "--profile"))
    status = json.loads((output / "_scumble/status.json").read_text())
    for stage, seconds in status["stage_seconds"].items():
        if stage in ("embed", "apply"):
            task.row(f"{name}: {stage}, start of its actors included", images / max(seconds, 1e-9), "images/s")
        else:
            task.row(f"{name}: {stage}", seconds, "s")
    profile = ProfileRecord.from_bytes((output / "_scumble/profile.json").read_bytes(), "profile.json")
    for stage in ("embed", "apply"):
        workers = [one for one in profile.workers if one.stage == stage]
        rate = sum(one.images_per_s for one in workers)
        task.row(f"{name}: {stage}, {len(workers)} workers at work", rate, "images/s", shares(workers))
    if name == "clip":
        run(job("verify", "--output", str(output), "--input", where[1]))
        task.row(f"{name}: verify", "ok")


def shares(workers: Sequence[WorkerShares]) -> str:
    """Where the workers' time went: means of their shares, and those of the threads that work ahead."""
    found = Counter[str]()
    for one in workers:
        found.update({step: share for step, share in one.shares.items()})
        found.update({f"{step}*": share for step, share in one.threads.items()})
    return ", ".join(f"{step} {total / len(workers):.0%}" for step, total in found.items())


def limits(task: Task, size: Size, name: str, options: list[str]) -> None:
    """The surrogate alone on resident tensors, its pictures copied and resized, and the codecs alone."""
    from codec_limits import codecs_alone
    from limits import model_alone, prepare_alone

    from pipeline.surrogates.surrogate import load_surrogate

    given = dict(zip(options[::2], options[1::2], strict=True))
    weights, side = given.get("--surrogate-weights"), given.get("--surrogate-size")
    surrogate = load_surrogate(
        given["--surrogate"],
        weights=Path(weights) if weights else None,
        size=int(side) if side else None,
        device=task.device,
    )
    rate = model_alone(surrogate, size.batch, size.calls)
    task.row(f"{name}: model alone on resident tensors, batch {size.batch}", rate, "images/s")
    rate = prepare_alone(surrogate, list(crops(size.batch, 500, 375)), max(1, size.calls // 4))
    task.row(f"{name}: copy and resize alone, 500x375", rate, "images/s")
    with tarfile.open(task.work / "in/shard-00000.tar") as tar:
        files = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    files = files if task.tiny else files * 8
    for what, rate in codecs_alone(files, surrogate.resize, task.cpus).items():
        task.row(f"{name}: {what}, alone on {task.cpus} cores", rate, "images/s")


if __name__ == "__main__":
    main()
