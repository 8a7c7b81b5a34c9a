"""Make a bank of concepts, name -> embedding, and see how many groups it falls into.

  python jobs/concepts.py --concepts pets --surrogate open_clip:ViT-B-32/openai --output pets.safetensors --groups 2-20
  python jobs/concepts.py --concepts names.txt --surrogate timm:tf_efficientnet_lite0 --output bank.safetensors

Names are embedded by the surrogate's text tower, or looked up among the classes of an ImageNet classifier; for names
that it lacks, near ones are shown, and no bank is written. train_one_for_all.py takes the bank as --concepts.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from jobs import importing
from jobs.shared import cli
from pipeline.errors import ConflictError, InputError, SettingsError
from pipeline.settings import DEFAULT_SURROGATE

_SHOWN = 40


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_concepts(argv)
    with importing():
        from pipeline.relearning.labels.sweep import groupings
        from pipeline.relearning.report.concepts_page import concepts_page
        from pipeline.storage.store import file_at
        from pipeline.surrogates.concepts import bank_bytes, bank_for, bank_lacks
        from pipeline.surrogates.surrogate import surrogate_for

    surrogate = surrogate_for(options, "cpu")
    lacking = bank_lacks(options.concepts, surrogate)
    if lacking:
        for name, near in list(lacking.items())[:_SHOWN]:
            print(f"lacking      {name}{near}")
        raise InputError(
            f"{surrogate.name} lacks {len(lacking)} of the names in {options.concepts}: use names that it has, or a "
            "surrogate with a text tower"
        )
    weights = Path(options.surrogate_weights) if options.surrogate_weights else None
    bank = bank_for(options.concepts, surrogate, weights=weights)
    groups = list(groupings(bank, options.groups or (), seed=options.seed))
    output, name = file_at(options.output)
    data = bank_bytes(bank)
    if not output.create(name, data) and output.read(name) != data:
        raise ConflictError(f"{options.output} is there already and differs: choose another --output")
    print(f"concepts     {len(bank.names):,}, {bank.embeddings.shape[1]:,} numbers each: {options.output}")
    for grouping in groups:
        print(
            f"groups       {grouping.groups}: SSE {grouping.sse:.4g}, silhouette {grouping.silhouette:.3f}, "
            f"Calinski-Harabasz {grouping.calinski_harabasz:.4g}"
        )
    if groups:
        page = f"{name.removesuffix('.safetensors')}.html"
        output.put(
            page, concepts_page(f"{options.concepts or 'default'}, {surrogate.name}", len(bank.names), groups).encode()
        )
        print(f"report       {output.url}/{page}")
    return cli.DONE


def group_counts(text: str) -> range:
    """Numbers of groups: 8, or 2-20. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    counts = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not counts:
        raise ValueError(text)
    return counts


def parse_concepts(argv: list[str] | None) -> Namespace:
    """The options. Raises SettingsError."""
    parser = cli.Parser(prog="concepts.py", usage="concepts.py --output FILE [options]", description=__doc__)
    banks = "head (the surrogate's classes), imagenet, cifar100, pets, a file of names, or a safetensors bank"
    parser.add_argument("--concepts", metavar="BANK", help=f"{banks} (default: head, or imagenet without one)")
    parser.add_argument(
        "--surrogate", default=DEFAULT_SURROGATE, metavar="NAME", help="encoder whose space they lie in"
    )
    parser.add_argument("--surrogate-weights", metavar="FILE", help="safetensors file with the surrogate's weights")
    parser.add_argument(
        "--output", metavar="FILE", help="the bank, a .safetensors file; the page of --groups goes beside it"
    )
    counts = "score groupings into N groups, or A to B: SSE, silhouette, Calinski-Harabasz, with a page of plots"
    parser.add_argument("--groups", type=group_counts, metavar="N|A-B", help=counts)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of k-means")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(surrogate_size=None)
    options: Namespace = parser.parse_args(argv)
    if not (options.output or "").endswith(".safetensors"):
        raise SettingsError("--output must be a file that ends in .safetensors")
    return options


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
