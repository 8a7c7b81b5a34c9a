"""How much of the deltas of a collection is the same in all images: what all share tells no class from another.

  python tests/bench/shared_delta.py --side 32 --clean 'data/train-*.tar' --protected 14a=protected/ [NAME=URL …]

Printed for each: RMS of delta in 8-bit levels, PSNR of the mean squared error, and the share of delta's energy that
lies in the mean over all images (1 if they all carry the same one). Images need a `.cls` label beside them.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from jobs.evaluation.options import named_urls
from pipeline.measures.scores import psnr_of
from pipeline.relearning.collection import Collection, like_clean, load_labelled
from pipeline.shards.inputs import resolve_input


def load(url: str, side: int) -> Collection:
    store, entries, *_ = resolve_input(url)
    return load_labelled(store, entries, side=side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", required=True)
    parser.add_argument("--protected", required=True, nargs="+", type=named_urls)
    parser.add_argument("--side", required=True, type=int)
    options = parser.parse_args()
    clean = load(options.clean, options.side)
    for name, url in ((name, url) for name, urls in options.protected for url in urls):
        protected = load(url, options.side)
        deltas = protected.images.astype(np.float32) - clean.images[like_clean(protected, clean, name)]
        energy, shared = float(np.mean(deltas**2)), float(np.mean(deltas.mean(axis=0) ** 2))
        rms = math.sqrt(energy)
        figures = f"rms {rms:.1f} levels, PSNR {psnr_of(rms):.1f} dB"
        print(f"{name:<20} {figures}, the same in all images {shared / energy:.0%}")


if __name__ == "__main__":
    main()
