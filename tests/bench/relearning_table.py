"""Results of an evaluation as Markdown:  python tests/bench/relearning_table.py evaluation/results.parquet"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.relearning.evaluation import CLEAN
from pipeline.relearning.report.results import MeanAccuracy, mean_accuracies, relearned, results_from_parquet
from pipeline.report.page import fits_range


def shown(found: MeanAccuracy | None) -> str:
    """'35.6 ± 0.3 (34.5 to 36.4 over 3 fits)', in per cent; ± over seeds."""
    if found is None or found.mean is None:
        return "–"
    return (
        f"{100 * found.mean:.1f}"
        + (f" ± {100 * found.sd:.1f}" if found.sd is not None else "")
        + fits_range(found.fits)
    )


def main() -> None:
    rows = results_from_parquet(Path(sys.argv[1]).read_bytes())
    for labelling in dict.fromkeys(row["labelling"] for row in rows):
        chosen = [row for row in rows if row["labelling"] == labelling]
        protections = list(dict.fromkeys([CLEAN, *sorted({row["protection"] for row in chosen})]))
        cells = mean_accuracies(chosen, ("protection", "regime", "target", "share"))
        targets = sorted({row["target"] for row in chosen})
        shares = sorted({row["share"] for row in chosen}, reverse=True)
        seeds = len({row["seed"] for row in chosen})
        floor = f"chance {100 / chosen[0]['num_classes']:.1f}, majority {100 * chosen[0]['majority']:.1f}"
        print(f"\nLabels `{labelling}`, {seeds} seeds, {chosen[0]['epochs']} epochs, {floor}; per cent, mean ± sd:\n")
        print(f"| regime | target | {' | '.join(protections)} |")
        print("|---|---|" + "---|" * len(protections))
        for target in targets:
            for regime in dict.fromkeys(row["regime"] for row in chosen):
                for share in shares:
                    found = [cells.get((one, regime, target, share)) for one in protections]
                    if any(found):
                        words = regime if share == "samples:1" else f"{regime}, {share}"
                        print(f"| {words} | {target} | {' | '.join(map(shown, found))} |")
        best = [relearned(chosen, one, labelling=labelling) for one in protections]
        worst = [f"**{100 * one.accuracy:.1f}**{fits_range(one.fits)}, {one.regime}" if one else "–" for one in best]
        print(f"| **relearned: worst case** | | {' | '.join(worst)} |")


if __name__ == "__main__":
    main()
