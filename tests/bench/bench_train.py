"""Speed of fitting deltas against a bare torch loop with the same networks:  python tests/bench/bench_train.py

Image-steps/s of ClusterFit (generator network, embedded surrogate) and of the delta steps of ProxyFit, each in turns
with a loop that draws, augments and updates in the plainest way and checks, records and reproduces nothing.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.deltas.generators import ResNetGenerator
from pipeline.deltas.samplewise.proxy_network import ProxyNetwork
from pipeline.fitting.cluster_fit import Aims, ClusterFit
from pipeline.fitting.direct_fit import ProxyFit
from pipeline.fitting.fit import FitImages
from pipeline.fitting.proxy_training import Schedule
from pipeline.settings import EMBEDDED_SURROGATE, Settings
from pipeline.surrogates.surrogate import Surrogate, load_surrogate

RESULTS = Path(__file__).parent / "results" / "train.json"
EPSILON, CLUSTERS = 16 / 255, 10
NEEDED = 0.95


def pictures(count: int, side: int) -> FitImages:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    return FitImages(pixels, torch.arange(count) % CLUSTERS)


def bare_cluster_loop(images: FitImages, surrogate: Surrogate, batch: int) -> Callable[[int], None]:
    generator, sigma = ResNetGenerator(), torch.rand(1, 3, images.side, images.side)
    optimiser = torch.optim.Adam(generator.parameters(), lr=1e-4, weight_decay=5e-4)
    aim = torch.randn(1, surrogate.dimension).softmax(1)

    def run(steps: int) -> None:
        for _ in range(steps):
            clean = images.pixels[torch.randperm(len(images.pixels))[:batch]].float() / 255
            clean = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, clean.flip(3), clean)
            delta = torch.tanh(generator(sigma)).clamp(-EPSILON, EPSILON)
            features = surrogate.embed((clean + delta).clamp(0, 1))
            loss = F.kl_div(features.log_softmax(1), aim.expand_as(features), reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return run


def jitter(images: Tensor) -> Tensor:
    """Colour changes like those of the fit, one line each."""
    draw = torch.rand(4, len(images), 1, 1, 1)
    images = images * (0.6 + 0.8 * draw[0])
    images = images.mean((1, 2, 3), keepdim=True).lerp(images, 0.6 + 0.8 * draw[1])
    grey = images.mean(1, keepdim=True)
    images = torch.where(draw[3] < 0.5, grey, grey.lerp(images, 0.2 + 1.6 * draw[2]))
    return images[:, torch.randperm(3)].clamp(0, 1)


def bare_proxy_loop(images: FitImages, batch: int) -> Callable[[int], None]:
    proxy = ProxyNetwork(CLUSTERS, images.side).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    deltas = torch.zeros(CLUSTERS, 3, images.side, images.side, requires_grad=True)
    momentum, aims, pad = torch.zeros_like(deltas), torch.randn(CLUSTERS, 192), images.side // 8

    def run(steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randperm(len(images.pixels))[:batch]
            clusters = images.clusters[chosen]
            seen = (images.pixels[chosen].float() / 255 + deltas[clusters]).clamp(0, 1)
            top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
            seen = F.pad(seen, (pad,) * 4, "reflect")[:, :, top : top + images.side, left : left + images.side]
            seen = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, seen.flip(3), seen)
            seen = torch.cat([jitter(seen[: batch // 2]), seen[batch // 2 :]])
            features = proxy.features(seen.contiguous(memory_format=torch.channels_last))
            loss = (features - aims[clusters]).square().sum(1).mean()
            (gradient,) = torch.autograd.grad(loss, deltas)
            with torch.no_grad():
                momentum.mul_(0.9).add_(gradient / gradient.abs().mean((1, 2, 3), keepdim=True))
                deltas.sub_(0.005 * momentum.sign()).clamp_(-EPSILON, EPSILON)

    return run


def compare(
    name: str, ours: Callable[[int], None], bare: Callable[[int], None], batch: int, steps: int, rounds: int
) -> dict[str, float | str]:
    """In turns, in seconds of processor time of one thread: others on the machine must not decide the ratio."""
    ours(1)
    bare(1)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(rounds):
        for which, run in (("ours", ours), ("bare", bare)):
            start = time.process_time()
            run(steps)
            times[which].append(time.process_time() - start)
    speed = {which: batch * steps / statistics.median(seconds) for which, seconds in times.items()}
    ratio = statistics.median(b / o for o, b in zip(times["ours"], times["bare"], strict=True))
    print(
        f"train {name}: {speed['ours']:.1f} image-steps/s, bare torch loop {speed['bare']:.1f}, ratio {ratio:.3f} "
        f"(needed {NEEDED}), median of {rounds} rounds of {steps} steps x {batch}",
        flush=True,
    )
    return {"fit": name, "ours_per_s": speed["ours"], "bare_per_s": speed["bare"], "ratio": ratio, "needed": NEEDED}


def main() -> None:
    torch.set_num_threads(1)
    batch, images = 32, pictures(320, 128)
    surrogate = load_surrogate(EMBEDDED_SURROGATE, weights=None, size=128, device="cpu")
    through = Settings(
        generator="network",
        optimise_through="surrogate",
        bound="tanh_clamp",
        distance="kl",
        steps=10_000,
        batch_size=batch,
    )
    means = torch.randn(CLUSTERS, surrogate.dimension)
    targets = [(cluster + 1) % CLUSTERS for cluster in range(CLUSTERS)]
    cluster_fit = ClusterFit(0, images, surrogate, Aims(means, targets), through)
    rows = [compare("ClusterFit", cluster_fit.advance, bare_cluster_loop(images, surrogate, batch), batch, 2, 7)]
    batch, images = 256, pictures(512, 32)
    # the speed of a delta's step does not depend on how well the proxy has learned
    settings = Settings(generator="direct", steps=10_000, batch_size=batch, proxy_steps=1)
    proxy_fit = ProxyFit(images, CLUSTERS, settings)
    proxy_fit.advance(Schedule.of(len(images.pixels), settings.proxy_steps).steps)  # the proxy's own
    rows.append(compare("ProxyFit", proxy_fit.advance, bare_proxy_loop(images, batch), batch, 5, 9))
    found = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = found | {"commit": commit, "command": "python tests/bench/bench_train.py", "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
