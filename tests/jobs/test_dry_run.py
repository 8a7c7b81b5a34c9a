"""What a dry run says beside its figures."""

from __future__ import annotations

import re

from jobs.protection.dry_run import print_hint
from pipeline.measures.estimate import Estimate


def estimated(images: int, apply: float, fit: float) -> Estimate:
    return Estimate(images, (64, 64), 1.0, 10, embed=0.01, apply=apply, fit=fit, makes_deltas=True)


def test_a_faster_generator_is_named_where_it_saves_time(capsys) -> None:
    # two workers; of a million images: 10,000 s of steps and 500 s of fit, or 1,000 s of passes and 800 s of fit,
    # beside 5,000 s of embedding and a minute or two
    print_hint(
        estimated(1_000_000, 0.02, 500.0), estimated(1_000_000, 0.002, 800.0), workers=2, what="--generator x protects"
    )
    said = capsys.readouterr().out
    assert re.fullmatch(r"hint +--generator x protects, and would take about 11[4-7] min\n", said)
    print_hint(estimated(5_000, 0.02, 500.0), estimated(5_000, 0.002, 800.0), workers=2, what="--generator x protects")
    assert capsys.readouterr().out == ""
