"""Check protected shards against their commits, and against the originals where they are at hand.

python jobs/verify.py --output protected/ [--input photos/]
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs import cli
from jobs.progress import progress
from pipeline import layout
from pipeline.errors import InputError, SettingsError
from pipeline.records import Commit
from pipeline.settings import Settings, settings_from
from pipeline.store import RUN_FOLDER, Store, resolve_input
from pipeline.verify import ShardCheck, verify_shard


def main(argv: list[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    if not options["output"]:
        raise SettingsError("--output is missing (see --help)")
    output = Store(options["output"])
    record = read_record(output)
    settings = settings_from({k: v for k, v in record["ingredients"]["settings"].items() if k != "generator_key"})
    source = resolve_input(options["input"])[0] if options["input"] else None
    there = {entry.name for entry in output.list()}
    committed = sorted(_shard_names(there))
    with progress("verify", len(committed)) as bar, ThreadPoolExecutor(options["workers"]) as pool:
        checks = []
        for check in pool.map(lambda n: _check(output, source, n, record, settings, options["decode"]), committed):
            bar.step(check.shard, images=check.num_samples)
            checks.append(check)
    problems = _missing(there, committed, record) + [line for check in checks for line in check.problems]
    _print(checks, problems, source is not None)
    return cli.FAILED if problems else cli.DONE


def parser() -> cli.Parser:
    made = cli.Parser(prog="verify.py", description=__doc__)
    made.add_argument("--output", metavar="URL", help="protected collection")
    made.add_argument("--input", metavar="URL", help="the originals: compare sidecars, order, and epsilon")
    made.add_argument("--decode", type=float, default=0.1, metavar="SHARE", help="share of images decoded (0.1)")
    made.add_argument("--workers", type=int, default=4, metavar="N", help="shards read at once (4)")
    made.add_argument("--debug", action="store_true", help="tracebacks")
    return made


def read_record(output: Store) -> dict[str, Any]:
    """run.json of an output. Raises InputError if there is none."""
    if output.info(layout.RUN) is None:
        raise InputError(f"{output.url} is not an output of a protection run: it has no {layout.RUN}")
    record: dict[str, Any] = json.loads(output.read(layout.RUN))
    return record


def _shard_names(there: set[str]) -> list[str]:
    commits, ending = f"{layout.COMMITS}/", ".json"
    return [name[len(commits) : -len(ending)] for name in there if name.startswith(commits)]


def _check(
    output: Store, source: Store | None, shard: str, record: dict[str, Any], settings: Settings, share: float
) -> ShardCheck:
    commit = Commit.from_json(json.loads(output.read(layout.commit(shard))))
    quarantined: set[str] = set()
    if commit.num_quarantined:
        lines = output.read(layout.quarantine(shard)).decode().splitlines()
        quarantined = {json.loads(line)["key"] for line in lines}
    try:
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(output.open(shard))
            theirs = stack.enter_context(source.open(shard)) if source else None
            check = verify_shard(commit, ours, theirs, quarantined, settings=settings, decode_share=share)
    except InputError as error:
        check = ShardCheck(shard, [str(error)])
    if commit.fingerprint != record["fingerprint"]:
        check.fail("", f"the commit bears fingerprint {commit.fingerprint[:16]}, the run {record['fingerprint'][:16]}")
    return check


def _missing(there: set[str], committed: list[str], record: dict[str, Any]) -> list[str]:
    """What is planned but not committed, and what lies there without a commit."""
    problems = []
    if len(committed) != record["num_shards"]:
        problems.append(
            f"{record['num_shards'] - len(committed)} of {record['num_shards']} shards are not committed: "
            "start the protection job again to finish"
        )
    strangers = sorted(there.difference(committed) - {n for n in there if n.startswith(f"{RUN_FOLDER}/")})
    return problems + [f"{name}: lies in the output without a commit, so it does not count" for name in strangers]


def _print(checks: list[ShardCheck], problems: list[str], with_originals: bool) -> None:
    def total(field: str) -> int:
        return sum(getattr(check, field) for check in checks)

    print(f"shards       {len(checks)} re-read and re-hashed")
    print(f"samples      {total('num_samples')} counted, {total('num_decoded')} decoded")
    if with_originals and checks:
        exact = max(check.max_exact_delta for check in checks)
        largest = max(check.max_abs_delta for check in checks)
        print(f"epsilon      largest change {exact} levels in {total('num_exact')} files written without loss")
        print(f"             largest change {largest} levels in any decoded file, lossy codec included")
    for line in problems[:50]:
        print(f"problem      {line}")
    print(f"result       {f'{len(problems)} problems' if problems else 'ok'}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
