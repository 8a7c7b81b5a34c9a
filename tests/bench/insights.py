"""What Dang et al. 2023 observe before they propose ST (sections III-A and IV-C2), on any protected collection:

  python tests/bench/insights.py --target small --clean 'data/train-*.tar' --test 'data/test-*.tar' --protected sp=sp/

Insight 1: a target learns from protected images at first, then forgets it for the deltas. Printed by epoch for clean
and protected images: accuracy on the training batches and on clean test images, the ACM, and the gradient mean value
(GMV: mean |gradient| over the parameters of the shallow blocks, mean over the steps of the epoch).

Insight 2: shallow layers decide. Two targets are trained on the protected images with two blocks that come from a
target trained on clean ones and stay as they are: the first two, or the last two. Stem and head always train.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from ratio import where, write
from shared_delta import load
from torch import Tensor, nn

from jobs.evaluation.options import named_urls
from pipeline.hashing import derive
from pipeline.relearning.collection import Collection, like_clean
from pipeline.relearning.regimes.staged.acm import activation_cluster_measure, validation_rows
from pipeline.relearning.regimes.staged.layers import ordered_layers
from pipeline.relearning.train import TargetScore, train_target
from pipeline.relearning.training import EpochScore, Labelled, Recipe, Regime, ScoredOn, Training

SWAPPED = 2  # blocks; "the first two residual blocks"


def blocks_of(network: nn.Module) -> list[list[str]]:
    """Parameter names of each block, shallow to deep: every layer but the first and the head."""
    return ordered_layers(network, "block")[1:-1]


class Watched(Regime):
    """Ordinary training with two more figures an epoch: acm, and gmv of the first two blocks."""

    name = "watched"

    def start(self, training: Training) -> None:
        self._rows = torch.from_numpy(validation_rows(training.labels.cpu().numpy(), seed=derive(training.seed, "st")))
        names = {name for block in blocks_of(training.network)[:SWAPPED] for name in block}
        self._shallow = [value for name, value in training.network.named_parameters() if name in names]
        self._sums: list[Tensor] = []
        for value in self._shallow:
            value.register_hook(lambda gradient: self._sums.append(gradient.abs().sum()))

    def begin_epoch(self, training: Training, epoch: int) -> None:
        self._sums.clear()

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        number = sum(value.numel() for value in self._shallow)
        gmv = float(torch.stack(self._sums).sum()) / number / training.num_batches if self._sums else 0.0
        features = training.features(training.images[self._rows]).cpu().numpy()
        acm = activation_cluster_measure(features, training.labels[self._rows].cpu().numpy(), reduce="none")
        return {"acm": float(acm), "gmv": gmv}


class Transplanted(Watched):
    """Some blocks come from another network of the same architecture and keep its weights and statistics.

    donor   state_dict of that network
    blocks  numbers of the blocks, counted as in `blocks_of`
    """

    name = "transplanted"

    def __init__(self, donor: dict[str, Tensor], blocks: Sequence[int]) -> None:
        self._donor, self._blocks = donor, blocks

    def start(self, training: Training) -> None:
        super().start(training)
        found = blocks_of(training.network)
        names = {name for number in self._blocks for name in found[number]}
        owners = {name.rpartition(".")[0] for name in names}
        self._kept = {
            name: self._donor[name].to(training.device)
            for name in training.network.state_dict()
            if name in names or name.rpartition(".")[0] in owners
        }
        for name, value in training.network.named_parameters():
            if name in names:
                value.requires_grad_(False)  # without a gradient the optimiser leaves it alone, its decay included
        self._put_back(training)

    def end_epoch(self, training: Training, epoch: int) -> dict[str, float]:
        self._put_back(training)  # the running statistics of batch norm moved
        return super().end_epoch(training, epoch)

    def _put_back(self, training: Training) -> None:
        training.network.load_state_dict(self._kept, strict=False)


def images_of(collection: Collection) -> Labelled:
    return Labelled(torch.from_numpy(collection.images), torch.from_numpy(collection.labels))


def table(histories: Mapping[str, Sequence[EpochScore]]) -> str:
    """Markdown, an epoch a line; accuracies in per cent."""
    lines = [f"| epoch | {' | '.join(f'{name}: train, test, ACM, GMV' for name in histories)} |"]
    lines.append("|---" * (1 + len(histories)) + "|")
    for epoch, scores in enumerate(zip(*histories.values(), strict=True), start=1):
        cells = [
            f"{100 * s.accuracy_train:.1f}, {100 * s.accuracy_test:.1f}, {s.figures['acm']:.2f}, {s.figures['gmv']:.1e}"
            for s in scores
        ]
        lines.append(f"| {epoch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_parser(description: str | None) -> argparse.ArgumentParser:
    """Which images are trained on, and how."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--protected", required=True, nargs="+", type=named_urls)
    parser.add_argument("--target", default="resnet18")
    parser.add_argument("--side", default=32, type=int)
    parser.add_argument("--epochs", default=30, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    options = training_parser(__doc__).parse_args()
    clean = load(options.clean, options.side)
    scored_on = ScoredOn(images_of(load(options.test, options.side)))
    networks: list[nn.Module] = []

    def trained(images: Labelled, regime: Regime) -> TargetScore:
        return train_target(
            images,
            scored_on,
            regime=regime,
            seed=options.seed,
            target=options.target,
            recipe=Recipe(epochs=options.epochs),
            device=options.device,
            on_epoch=lambda training: networks.append(training.network),
        )

    histories = {"clean": trained(images_of(clean), Watched()).history}
    donor = {name: value.clone() for name, value in networks[-1].state_dict().items()}
    last = len(blocks_of(networks[-1]))
    parts = {"shallow": range(SWAPPED), "deep": range(last - SWAPPED, last)}
    for name, urls in options.protected:
        collection = load(urls[0], options.side)
        like_clean(collection, clean, name)
        histories[name] = trained(images_of(collection), Watched()).history
        for part, blocks in parts.items():
            histories[f"{name}, {part} blocks from clean"] = trained(
                images_of(collection), Transplanted(donor, blocks)
            ).history
    print(table(histories))
    rows = {name: [vars(score) for score in history] for name, history in histories.items()}
    chosen = {"target": options.target, "epochs": options.epochs, "seed": options.seed, "device": options.device}
    write("insights", {"settings": chosen, "machine": where()["machine"], "histories": rows})


if __name__ == "__main__":
    main()
