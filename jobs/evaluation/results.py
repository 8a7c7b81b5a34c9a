"""The last steps of a relearning evaluation: tables and report of the trials that are finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs.evaluation.steps import Loaded, unfinished
from jobs.shared import cli
from pipeline.relearning.evaluation import CLEAN, HISTORIES, REPORT, RESULTS, WHOLE, EvaluationSettings, Trial
from pipeline.relearning.report.results import histories_to_parquet, read_row, relearned, results_to_parquet
from pipeline.relearning.report.tables import denoisers, order_of
from pipeline.report.page import fits_range


def gather(settings: EvaluationSettings, trials: Sequence[Trial], loaded: Loaded) -> list[dict[str, Any]]:
    """Write tables and report, and print the figure of every protection; returns the rows of all trials."""
    from pipeline.relearning.report.evaluation_page import (  # matplotlib, at the end only
        EvaluationAbout,
        write_relearning_report,
    )

    output = loaded.output
    rows = [read_row(output, trial) for trial in trials]
    output.put(RESULTS, results_to_parquet(rows))
    output.put(HISTORIES, histories_to_parquet(rows))
    given = (settings.clean, settings.test, settings.protected, asdict(settings), loaded.left_out)
    about = EvaluationAbout(*given, pairs=settings.pairs or ())
    output.put(REPORT, write_relearning_report(rows, about=about).encode())
    for share in settings.shares:
        print(f"\n{'relearned accuracy (worst case)' if share == WHOLE else share:<34}{'accuracy':>10}  regime")
        for name in (CLEAN, *settings.protected):
            worst = relearned(rows, name, labelling=settings.labellings[0], share=share)
            if worst is not None:
                spread = fits_range(worst.fits)
                print(f"  {name:<32}{worst.accuracy:>10.1%}  {worst.regime} ({worst.num_regimes} tried){spread}")
    _print_gains(settings, rows)
    print(f"\nresults      {output.url}/{RESULTS}")
    print(f"report       {output.url}/{REPORT}")
    return rows


def gather_finished(settings: EvaluationSettings, trials: Sequence[Trial], loaded: Loaded) -> None:
    """What `gather` does, of the trials that were finished before one failed; nothing if there are none."""
    left = {trial.key for trial in unfinished(trials, loaded.output)}
    finished = [trial for trial in trials if trial.key not in left]
    if finished:
        cli.warn(f"tables and report hold the {len(finished):,} of {len(trials):,} trials that are finished")
        gather(settings, finished, loaded)


def _print_gains(settings: EvaluationSettings, rows: Sequence[dict[str, Any]]) -> None:
    denoised = denoisers(rows, order_of(rows, settings.protected, asdict(settings)))
    if denoised:
        print(f"\n{'denoisers, gain in dB':<34}{'own pictures':>14}{'here':>8}")
    for regime, name, gains in denoised:
        own, here = (f"{gain:.1f}" if gain is not None else "–" for gain in gains)
        print(f"  {f'{regime} on {name}':<32}{own:>14}{here:>8}")
