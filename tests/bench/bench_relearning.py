"""Speed and accuracy of training targets against a plain DataLoader loop:

  python tests/bench/bench_relearning.py [--target resnet18] [--epochs 2] [--images 2000] [--seeds 1] [--device cuda]

Ours: `train_target` on arrays that were decoded once, the decoding counted. Plain: webdataset, PIL decode in every
epoch, torchvision's crop (reflect 4) and flip and normalisation image by image, a DataLoader with a worker per CPU,
the same network, batch size, optimiser and schedule, in float32 on a CPU and in bf16 on a GPU. Both use all CPUs;
neither is compiled. What ours gains on a CPU beside the decoding is bf16, where the CPU has it, and channels_last.

The arithmetic's limit is measured beside: ours as a share of the floating-point operations per second of the network's
own convolutions alone, one after the other in bf16, and of a large matrix product.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import webdataset
from PIL import Image
from ratio import where, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from pipeline.hashing import derive
from pipeline.records import Shard
from pipeline.relearning.collection import Collection, load_labelled
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.targets import build_target
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn
from pipeline.shards.inputs import resolve_input
from pipeline.storage.store import Store

SIDE, BATCH = 32, 128
CIFAR10 = "data/cifar10"  # made by tests/make_data.py
NEEDED = {"cpu": 3.0, "cuda": 5.0}
STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
AUGMENT = transforms.Compose(
    [
        transforms.RandomCrop(SIDE, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*STATISTICS),
    ]
)
PREPARE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*STATISTICS)])


def decoded(sample: dict[str, Any]) -> Image.Image:
    data = next(sample[suffix] for suffix in ("webp", "png", "jpg") if suffix in sample)
    return Image.open(io.BytesIO(data)).convert("RGB")


def augmented(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return AUGMENT(decoded(sample)), int(sample["cls"])


def prepared(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return PREPARE(decoded(sample)), int(sample["cls"])


def loader(paths: list[str], view: Any, shuffle: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of batches, as webdataset's own examples do it."""
    workers = min(os.cpu_count() or 1, len(paths))
    shards = webdataset.WebDataset(paths, shardshuffle=len(paths) if shuffle else False)
    dataset = (shards.shuffle(shuffle) if shuffle else shards).map(view)
    batches = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=bool(shuffle))
    for number, (images, labels) in enumerate(batches):
        if limit and number * BATCH >= limit:
            return
        yield images, labels


def plain(train: list[str], test: list[str], count: int, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds of the training epochs, and accuracy on the test images at the end."""
    torch.manual_seed(seed)
    device, recipe = torch.device(options.device), replace(Recipe(), epochs=options.epochs)
    network = build_target(options.target, 10, SIDE, seed=derive(seed, "target-weights")).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = options.epochs * (count // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: recipe.rate(min(step, steps - 1), steps))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    started = time.perf_counter()
    for _ in range(options.epochs):
        network.train()
        for images, labels in loader(train, augmented, 2_000, options.images):
            with autocast:
                scores = network(images.to(device))
            loss = F.cross_entropy(scores.float(), labels.to(device), label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    seconds = time.perf_counter() - started
    return seconds, accuracy(network, test, device)


@torch.no_grad()
def accuracy(network: nn.Module, test: list[str], device: torch.device) -> float:
    network.eval()
    correct = total = 0
    for images, labels in loader(test, prepared, 0, 0):
        correct += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return correct / total


def ours(train: list[str], test: Collection, options: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """Seconds of decoding, seconds of the training epochs without their tests, and accuracy."""
    started = time.perf_counter()
    stores = [(Store(os.path.dirname(path)), os.path.basename(path)) for path in train]
    clean = load_labelled(stores[0][0], [Shard(name, 0, "") for _, name in stores], side=SIDE)
    if options.images:
        clean = clean.rows(torch.arange(options.images).numpy())
    decoding = time.perf_counter() - started
    score = train_target(
        Labelled(torch.from_numpy(clean.images), torch.from_numpy(clean.labels)),
        ScoredOn(Labelled(torch.from_numpy(test.images), torch.from_numpy(test.labels))),
        regime=find_regime("nt"),
        seed=seed,
        target=options.target,
        recipe=replace(Recipe(), epochs=options.epochs, batch_size=BATCH),
        device=options.device,
    )
    return decoding, score.train_seconds, score.accuracy_last


def operations(target: str) -> int:
    """Floating-point operations of a training step for one image, counted by torch."""
    network, images = build_target(target, 10, SIDE, seed=0), torch.zeros(2, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return int(counter.get_total_flops()) // len(images)


def limits(target: str, device: str) -> dict[str, float]:
    """Operations per second in bf16 of the network's convolutions, forward and backward, and of a matrix product."""
    steps: list[Callable[[], object]] = []
    network = build_target(target, 10, SIDE, seed=0).to(device, torch.bfloat16)
    network = network.to(memory_format=torch.channels_last)
    hooks = [
        layer.register_forward_hook(lambda layer, given, _: steps.append(one_step(layer, given[0])))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=device, dtype=torch.bfloat16)
    network(images.contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    left, right = torch.randn(2, 2048, 2048, device=device, dtype=torch.bfloat16)
    seconds = sum(quickest(step, device) for step in steps)
    product = 2 * 2048**3 / quickest(lambda: left @ right, device)
    return {"convolutions": operations(target) * BATCH / seconds, "product": product}


def one_step(layer: nn.Module, given: Tensor) -> Callable[[], object]:
    """A forward and backward pass of one layer."""
    images = given.detach().clone(memory_format=torch.preserve_format).requires_grad_(given.shape[1] > 3)
    return lambda: layer(images).sum().backward()


def quickest(step: Callable[[], object], device: str) -> float:
    """Least seconds of ten calls, after a first one."""
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=f"{CIFAR10}/cifar10-train-*.tar.gz")
    parser.add_argument("--test", default=f"{CIFAR10}/cifar10-test-*.tar.gz")
    parser.add_argument("--target", default="resnet18")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=0, help="of the training set (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    paths = {name: shards(getattr(options, name)) for name in ("train", "test")}
    test_store, entries, *_ = resolve_input(options.test)
    test = load_labelled(test_store, entries, side=SIDE)
    train_store, entries, *_ = resolve_input(options.train)
    count = options.images or len(load_labelled(train_store, entries, side=SIDE))
    rows = []
    for seed in range(options.seeds):
        decoding, seconds, reached = ours(paths["train"], test, options, seed)
        plain_seconds, plain_reached = plain(paths["train"], paths["test"], count, options, seed)
        row = {"decode_s": decoding, "ours_s": seconds, "plain_s": plain_seconds}
        rows.append(row | {"ours_accuracy": reached, "plain_accuracy": plain_reached})
        print(" ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    ratio = statistics.median(row["plain_s"] / (row["decode_s"] + row["ours_s"]) for row in rows)
    epoch = statistics.median(row["plain_s"] / row["ours_s"] for row in rows)
    means = {name: statistics.mean(row[f"{name}_accuracy"] for row in rows) for name in ("ours", "plain")}
    needed = NEEDED[torch.device(options.device).type]
    found = {"target": options.target, "epochs": options.epochs, "images": count, "device": options.device}
    print(
        f"relearning {options.target}, {count:,} images, {options.epochs} epochs on {options.device}: "
        f"{epoch:.2f} x faster per epoch (needed {needed}), {ratio:.2f} x with the decoding; "
        f"accuracy {means['ours']:.1%}, plain {means['plain']:.1%}, {options.seeds} seeds; load {where()['load']}"
    )
    possible = limits(options.target, options.device)
    reached = operations(options.target) * count * options.epochs / statistics.median(row["ours_s"] for row in rows)
    shares = {name: reached / limit for name, limit in possible.items()}
    print(
        f"{reached / 1e9:,.0f} GFLOP/s: {shares['convolutions']:.0%} of its convolutions alone "
        f"({possible['convolutions'] / 1e9:,.0f}), {shares['product']:.0%} of a matrix product"
    )
    found |= {"flops_per_s": reached, "limits": possible, "shares": shares}
    record = found | {"epoch_ratio": epoch, "ratio": ratio, "accuracies": means, "needed": needed, "rows": rows}
    write(f"relearning_{options.target}", record)


def shards(url: str) -> list[str]:
    """Paths of local shards."""
    store, entries, *_ = resolve_input(url)
    return [f"{store.url}/{entry.name}" for entry in entries]


if __name__ == "__main__":
    main()
