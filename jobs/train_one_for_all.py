"""Train a universal generator:  python jobs/train_one_for_all.py --input photos/ --output universal.safetensors"""

from __future__ import annotations

from actors.connect import connected
from jobs import cli
from jobs.one_for_all import load, prepare, report, train
from jobs.one_for_all_options import parse_one_for_all


def main(argv: list[str] | None = None) -> int:
    settings = parse_one_for_all(argv)
    run = prepare(settings)
    print(run.summary)
    if not run.is_done:
        with connected(settings):
            squares = load(run)
            train(run, squares)
    return report(run)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
