"""Speed of making a delta for each image:  python tests/bench/bench_samplewise.py

Images per second and core of `--generator sample` (30 steps) and `distilled`, at 32 and 64 px, each in turns with what
its networks alone take: forward and backward passes through proxies (forward passes through the distilled network) over
the same batches, without views, draws, sign steps and rounding. Weights are random: they do not decide the time.
"""

from __future__ import annotations

import numpy as np
import torch
from ratio import Row, in_turns, publish, row
from torch.nn import functional as F

from pipeline.deltas.samplewise.base import BATCH, DeltaMaker
from pipeline.deltas.samplewise.distilled import DistilledGenerator, DistilledNetwork, DistilledPass
from pipeline.deltas.samplewise.proxy_network import ProxyNetwork, frozen_proxy
from pipeline.deltas.samplewise.sample_steps import SampleGenerator, SampleSteps

CLUSTERS, PROXIES, STEPS, EPSILON = 10, 3, 30, 16 / 255
CPU = torch.device("cpu")
ROUNDS, IMAGES = 9, {"sample": 48, "distilled": 480}
NEEDED = 0.9


def proxies(side: int) -> list[ProxyNetwork]:
    torch.manual_seed(0)
    return [ProxyNetwork(CLUSTERS, side) for _ in range(PROXIES)]


def weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


def compared(what: str, maker: DeltaMaker, networks_alone: torch.nn.Module | None, side: int) -> Row:
    """Deltas of some images, in turns with the passes of their networks."""
    count = IMAGES[what]
    squares = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    clusters, keys = [row % CLUSTERS for row in range(count)], [str(row) for row in range(count)]
    batch, targets = BATCH["cpu"], torch.arange(BATCH["cpu"]) % CLUSTERS
    seen = torch.rand(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    frozen = [frozen_proxy(proxy, CPU) for proxy in proxies(side)]

    def ours(_: int) -> int:
        maker.levels(squares, clusters, keys)
        return count

    def plain(_: int) -> int:
        for _ in range(count // batch):
            if networks_alone is not None:
                with torch.no_grad():
                    networks_alone(seen, seen[:, :1], targets)
                continue
            for step in range(STEPS):
                images = seen.detach().requires_grad_()
                loss = F.cross_entropy(frozen[step % PROXIES](images), targets, reduction="sum")
                torch.autograd.grad(loss, images)
        return count

    return row(f"{what}, {side} px, beside its networks alone", "image", in_turns(ours, plain, ROUNDS), NEEDED)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for side in (32, 64):
        targets = list(range(CLUSTERS))
        steps = SampleGenerator(side, STEPS, False, 0, tuple(weights(proxy) for proxy in proxies(side)))
        rows.append(compared("sample", SampleSteps(steps, targets, EPSILON), None, side))
        network = DistilledNetwork(CLUSTERS, side, plain=False).to(memory_format=torch.channels_last).eval()
        distilled = DistilledGenerator(side, False, 0, weights(network))
        rows.append(compared("distilled", DistilledPass(distilled, targets, EPSILON), network, side))
    publish("samplewise", rows)
    for one in rows:
        print(f"{one.what}: {1000 / one.ours_per_cpu_s:.1f} ms an image and core")


if __name__ == "__main__":
    main()
