"""What does a protected collection still teach?  python jobs/evaluate_relearning.py --clean URL --protected uc=URL …"""

from __future__ import annotations

from actors.connect import connected
from jobs import cli
from jobs.evaluate_options import parse_evaluation
from jobs.evaluation import check_names, gather, left_of, load, plan, train


def main(argv: list[str] | None = None) -> int:
    settings = parse_evaluation(argv)
    check_names(settings)
    with connected(settings):
        loaded = load(settings)
        trials = plan(settings, loaded)
        train(settings, loaded, left_of(trials, loaded.output))
    return gather(settings, trials, loaded.output)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
