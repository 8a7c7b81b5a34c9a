"""What single blocks make of the training images, by epoch (Dang et al. 2023, Figures 11 and 13):

  python tests/bench/block_pictures.py --target resnet18 --blocks 4,6 --clean 'data/train-*.tar' \\
      --test 'data/test-*.tar' --protected em=em/ --output blocks/

t-SNE of the output of a block on the images on which ACM is measured, for a target trained on the clean images and two
on the protected ones, one of them by ST. One picture for each block and protection; colours are the labels. A block is
counted from 1, after the first convolution.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from insights import blocks_of, images_of, training_parser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from shared_delta import load
from torch import Tensor, nn

from pipeline.hashing import derive
from pipeline.relearning.collection import like_clean
from pipeline.relearning.regimes import find_regime
from pipeline.relearning.regimes.staged.acm import validation_rows
from pipeline.relearning.regimes.staged.projection import project
from pipeline.relearning.train import train_target
from pipeline.relearning.training import Labelled, Recipe, ScoredOn, Training

BATCH = 256
Map = Mapping[str, Any]  # epoch, points float [n, 2], labels int [n]


def block_module(network: nn.Module, block: int) -> nn.Module:
    """The module that holds all parameters of a block, from 1. Raises ValueError if there is no such block."""
    found = blocks_of(network)
    if not 1 <= block <= len(found):
        raise ValueError(f"there is no block {block}; this target has {len(found)}")
    owners = [name.rpartition(".")[0] for name in found[block - 1]]
    return network.get_submodule(os.path.commonpath([owner.replace(".", "/") for owner in owners]).replace("/", "."))


def outputs(training: Training, block: int, images: Tensor) -> NDArray[np.float32]:
    """What a block makes of images, uint8 [n, 3, S, S]: float32 [n, d]."""
    kept: list[Tensor] = []
    module = block_module(training.network, block)
    handle = module.register_forward_hook(lambda _module, _given, made: kept.append(made.flatten(1).float().cpu()))
    try:
        for start in range(0, len(images), BATCH):
            training.features(images[start : start + BATCH])
    finally:
        handle.remove()
    return torch.cat(kept).numpy()


def shown_epochs(epochs: int, columns: int = 5) -> list[int]:
    """The first, the last, and some between, from 1."""
    return sorted({int(epoch) for epoch in np.linspace(1, epochs, columns).round()})


def draw(rows: Mapping[str, Sequence[Map]], path: Path) -> None:
    """A row for each training, a column for each epoch."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(2 * columns, 2 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(len(rows), columns, squeeze=False)
    palette = mpl.colormaps["tab10"](np.arange(10))
    for axes_of_row, (name, maps) in zip(places, rows.items(), strict=True):
        for axes, one in zip(axes_of_row, maps, strict=True):
            points = np.asarray(one["points"])
            axes.scatter(points[:, 0], points[:, 1], s=4, c=palette[np.asarray(one["labels"]) % 10], linewidths=0)
            axes.set_title(f"epoch {one['epoch']}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        axes_of_row[0].set_ylabel(name, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--blocks", default="4,6", type=lambda text: [int(part) for part in text.split(",")])
    options = parser.parse_args()
    clean = load(options.clean, options.side)
    scored_on = ScoredOn(images_of(load(options.test, options.side)))
    chosen = shown_epochs(options.epochs)

    def mapped(images: Labelled, regime: str) -> dict[int, list[Map]]:
        """The maps of every block, by training once."""
        rows = torch.from_numpy(validation_rows(images.labels.numpy(), seed=derive(options.seed, "st")))
        maps: dict[int, list[Map]] = {block: [] for block in options.blocks}

        def look(training: Training) -> None:
            epoch = len(training.history)
            if epoch not in chosen:
                return
            for block, found in maps.items():
                points = project(outputs(training, block, training.images[rows]), seed=0)["tsne"]
                found.append({"epoch": epoch, "points": points, "labels": images.labels[rows].tolist()})

        score = train_target(
            images,
            scored_on,
            regime=find_regime(regime),
            seed=options.seed,
            target=options.target,
            recipe=Recipe(epochs=options.epochs),
            device=options.device,
            on_epoch=look,
        )
        print(f"{regime}: {score.accuracy_last:.1%} of the test images", flush=True)
        return maps

    of_clean = mapped(images_of(clean), "nt")
    for name, urls in options.protected:
        collection = load(urls[0], options.side)
        like_clean(collection, clean, name)
        images = images_of(collection)
        of_protected, of_staged = mapped(images, "nt"), mapped(images, "st")
        for block in options.blocks:
            path = options.output / f"{name}-block-{block}.png"
            rows = {"clean": of_clean[block], name: of_protected[block], f"{name}, ST": of_staged[block]}
            draw(rows, path)
            print(path)


if __name__ == "__main__":
    main()
