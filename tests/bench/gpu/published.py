"""Step 4: Unlearnable Clusters as published: the network generator at 224 px through a ResNet-50."""

from __future__ import annotations

import time

import torch
from rows import told

from pipeline.fitting.cluster_fit import Aims, ClusterFit, NetworkShape
from pipeline.fitting.fit import FitImages
from pipeline.settings import settings_from
from pipeline.surrogates.surrogate import load_surrogate

WARM_UP = 2  # steps
CLUSTERS, PAPER_STEPS = 10, 750  # Pets: 3,680 images, 50 epochs of batches of 256


def main() -> None:
    task = told()
    side, batch = (64, 2) if task.tiny else (224, 256)
    count, steps = (8, 1) if task.tiny else (1024, 8)
    surrogate = load_surrogate("torchvision:resnet50/random-0", weights=None, size=side, device=task.device)
    settings = settings_from({"batch_size": batch, "steps": steps + WARM_UP}, preset="uc-paper")
    pixels = torch.randint(0, 256, (count, 3, side + side // 8, side + side // 8), dtype=torch.uint8)
    images = FitImages(pixels, torch.arange(count) % CLUSTERS)
    means = torch.randn(CLUSTERS, surrogate.dimension)
    targets = [(cluster + 1) % CLUSTERS for cluster in range(CLUSTERS)]
    shape = NetworkShape(width=4, blocks=1) if task.tiny else NetworkShape()
    fit = ClusterFit(0, images, surrogate, Aims(means, targets), settings, task.device, side=side, shape=shape)
    fit.advance(WARM_UP)
    started = time.perf_counter()
    fit.advance(steps)  # every step checks its loss, which waits for the device
    rate = steps / (time.perf_counter() - started)
    task.row(f"generator network through ResNet-50, {side} px, batch {batch}", rate, "steps/s")
    task.row("Pets, 10 clusters of 750 steps", CLUSTERS * PAPER_STEPS / rate / 3600, "GPU hours")
    if task.device == "cuda":
        task.row("largest memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


if __name__ == "__main__":
    main()
