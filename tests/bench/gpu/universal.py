"""Step 3: One for All with the paper's generator: speed and memory, then the job, killed and resumed."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from limits import per_second
from rows import BENCH, Task, has, job, run, told
from torch.nn import functional as F

sys.path.insert(0, str(BENCH))
from photo_shards import write_shards  # noqa: E402

from pipeline.deltas.universal.generator import UniversalGenerator  # noqa: E402
from pipeline.one_for_all.settings import BLOCKS, WIDTH, one_for_all_settings  # noqa: E402
from pipeline.one_for_all.training import TrainingImages, UniversalFit  # noqa: E402
from pipeline.settings import EMBEDDED_SURROGATE  # noqa: E402
from pipeline.surrogates.surrogate import Surrogate, load_surrogate  # noqa: E402
from tests.support.processes import descendants, kill  # noqa: E402

BATCH, TRAIN_STEPS = 32, 10
CHECKPOINT_S = 90.0  # after which the job is killed even if it has left no checkpoint yet


def main() -> None:
    task = told()
    width, blocks, side = (4, 1, 64) if task.tiny else (WIDTH, BLOCKS, 224)
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=side, device=task.device)
    forward(task, surrogate, width, blocks, side)
    training(task, surrogate, width, blocks, side)
    if has("ray"):
        killed_and_resumed(task, width, blocks, side)
    else:
        task.row("train_one_for_all.py", "skipped: ray is not installed")


@torch.inference_mode()
def forward(task: Task, surrogate: Surrogate, width: int, blocks: int, side: int) -> None:
    """Images per second of the generator alone, in bfloat16 on a GPU."""
    generator = UniversalGenerator(surrogate.dimension, width=width, blocks=blocks).eval().to(task.device)
    generator = generator.to(memory_format=torch.channels_last)
    count = sum(parameter.numel() for parameter in generator.parameters())
    task.row("parameters of the generator", count / 1e6, "millions")
    for batch in (2,) if task.tiny else (64, 256):
        images = torch.rand(batch, 3, side, side, device=task.device).contiguous(memory_format=torch.channels_last)
        features = F.normalize(torch.randn(batch, surrogate.dimension, device=task.device), dim=1)

        def once(images: torch.Tensor = images, features: torch.Tensor = features) -> None:
            with torch.autocast(task.device, torch.bfloat16, enabled=task.device == "cuda"):
                generator(images, features)

        rate = per_second(once, batch, task.device, 1 if task.tiny else 5)
        task.row(f"generator forward, {side} px, batch {batch}", rate, "images/s")


def training(task: Task, surrogate: Surrogate, width: int, blocks: int, side: int) -> None:
    """Steps per second of the training, and the largest memory."""
    settings = one_for_all_settings(
        {
            "input": ("-",),
            "output": "-.safetensors",
            "surrogate": EMBEDDED_SURROGATE,
            "surrogate_size": side,
            "width": width,
            "blocks": blocks,
            "side": side,
            "batch_size": 8 if task.tiny else BATCH,
        }
    )
    edge = side + side // 8
    pixels = torch.randint(0, 256, (4 * settings.batch_size, 3, edge, edge), dtype=torch.uint8)
    fit = UniversalFit(TrainingImages(pixels), surrogate, torch.randn(1000, surrogate.dimension), settings, task.device)
    fit.advance(1 if task.tiny else 3)
    started, steps = time.perf_counter(), 1 if task.tiny else TRAIN_STEPS
    fit.advance(steps)  # every step ends by reading its figures, which waits for the device
    rate = steps / (time.perf_counter() - started)
    task.row(
        f"training, batch {settings.batch_size}",
        rate,
        "steps/s",
        f"{settings.max_steps / rate / 3600:.1f} h for {settings.max_steps:,}",
    )
    if task.device == "cuda":
        task.row("largest memory of the training", torch.cuda.max_memory_allocated() / 1e9, "GB")


def killed_and_resumed(task: Task, width: int, blocks: int, side: int) -> None:
    """The job for a while, SIGKILL once it has a checkpoint, then again to its end."""
    shards = write_shards(
        task.work / "in", shards=2, per_shard=32 if task.tiny else 512, width=256, height=256, distinct=64
    )
    steps = 20 if task.tiny else 150
    sizes = {"width": width, "blocks": blocks, "side": side, "surrogate-size": side, "max-steps": steps}
    sizes |= {"batch-size": 8 if task.tiny else BATCH, "checkpoint-every": 0 if task.tiny else 10}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    where = ["--input", str(shards[0].parent), "--output", str(task.work / "u.safetensors")]
    command = job("train_one_for_all", *where, "--surrogate", EMBEDDED_SURROGATE, *flags, *task.gpu_options)
    process = subprocess.Popen(command, start_new_session=True)
    until = time.monotonic() + CHECKPOINT_S
    while process.poll() is None and time.monotonic() < until and not list(task.work.glob("u.*.checkpoint")):
        time.sleep(0.2)
    was_running = process.poll() is None
    checkpoints = list(task.work.glob("u.*.checkpoint"))
    kill_tree(process)
    task.row("train_one_for_all.py killed", "with a checkpoint" if checkpoints else "before its first checkpoint")
    if not was_running and not (task.work / "u.safetensors").is_file():
        raise SystemExit("train_one_for_all.py ended by itself, without a protection")
    started = time.monotonic()
    out = run(command)
    task.row("train_one_for_all.py resumed to its end", time.monotonic() - started, "s", out.splitlines()[-3].strip())


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """The job and everything that it started."""
    below = descendants(process.pid) if process.poll() is None else []
    for pid in (process.pid, *below) if process.poll() is None else ():
        kill(pid)
    process.wait()


if __name__ == "__main__":
    main()
