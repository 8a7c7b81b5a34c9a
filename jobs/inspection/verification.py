"""The checks of verify: every committed file is read again and compared with its record and its original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.shared.progress import progress
from pipeline import layout
from pipeline.deltas.artefact import read_header
from pipeline.errors import InputError
from pipeline.layout import RUN_FOLDER
from pipeline.measures.verify import Expected, ShardCheck, VerifySettings, verify_images, verify_shard
from pipeline.records import Commit, Shard, losses_of, read_quarantine
from pipeline.relearning.report.certificate import Certificates, fit_at
from pipeline.report.report_data import losses
from pipeline.runs.plan import planned_units
from pipeline.runs.run_record import RunRecord, read_run
from pipeline.shards.inputs import resolve_input
from pipeline.shards.names import is_of_the_system
from pipeline.shards.samples import samples_of
from pipeline.storage.bounded import bounded_map
from pipeline.storage.store import Store
from pipeline.uploads.origin import Origin
from pipeline.uploads.verify import strangers, verify_row, written_rows

# of the settings; they never conflict
NEEDED = ("epsilon", "size", "seed", "keep_sidecar", "max_pixels", "max_member_bytes")
# runs over uploads may differ in their limits, and the records do not say in which an upload was protected
OF_ANY_SIZE = {"max_pixels": 1 << 40, "max_member_bytes": 1 << 40}
LEAST_DECODED = 10  # about so many of few images, whatever share is asked for
AHEAD = 64  # files that are handed to threads before the first of them is done


def certified_as(output: Store, file: Path) -> str:
    """What the certificate says about this collection; "" if it is about others. Raises InputError."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"--certificate {file}: {error.strerror}") from None
    certified = Certificates.from_bytes(data, str(file)).of(fit_at(output, output.url).collection_sha256)
    if certified is None:
        return ""
    certificate, number = certified
    worst, clean = certificate.worst, certificate.clean
    return (
        f"fit {number} of {len(certificate.fits)} of {certificate.protection}: at most {worst.accuracy:.1%} relearned "
        f"({worst.regime}), {clean.accuracy:.1%} on clean images; battery {certificate.battery}"
    )


def check_run(output: Store, originals: str | None, share: float, pool: ThreadPoolExecutor) -> ShardCheck:
    """Check every shard that has a commit."""
    record = read_run(output)
    settings = _needed(record.ingredients.settings)
    if (protection := output.read_if_there(layout.PROTECTION)) is not None:  # of a baseline, it may be stricter
        settings = replace(settings, epsilon=min(settings.epsilon, float(read_header(protection)["epsilon"])))
    source = resolve_input(originals).store if originals else None
    ours = f"{RUN_FOLDER}/"
    there = {name for name in output.names() if name.startswith(f"{layout.COMMITS}/") or not name.startswith(ours)}
    committed = sorted(_shard_names(there))
    result = ShardCheck("", _missing(committed, record), lost=list(losses(output, ())), files=0)
    units = _units(output)  # also without originals: of a unit in quarantine, the commit names no file
    check = partial(_check, output, source, units=units, record=record, settings=settings, share=share)
    result = _added(result, len(committed), bounded_map(pool, check, committed, ahead=AHEAD))
    unknown = sorted(
        name for name in there.difference(result.written) if not name.startswith(ours) and not is_of_the_system(name)
    )
    result.problems += [f"{name}: in the output without a commit, so it does not count" for name in unknown]
    return result


def _units(output: Store) -> dict[str, Shard]:
    """The units of loose images that the run was planned with."""
    data = output.read_if_there(layout.PLAN)
    return {} if data is None else planned_units(data, f"{output.url}/{layout.PLAN}")


def _added(found: ShardCheck, total: int, checks: Iterable[ShardCheck]) -> ShardCheck:
    with progress("verify", total) as bar:
        for check in checks:
            bar.step(check.shard, images=check.num_samples)
            found.add(check)
    return found


def _needed(settings: Mapping[str, Any]) -> VerifySettings:
    return VerifySettings(**{name: value for name, value in settings.items() if name in NEEDED})


def check_uploads(output: Store, originals: str | None, share: float, pool: ThreadPoolExecutor) -> ShardCheck:
    """Check every output that has a row in the ledger."""
    origin = Origin.from_bytes(output.read(layout.UPLOADS_ORIGIN), f"{output.url}/{layout.UPLOADS_ORIGIN}")
    settings = _needed({**origin.settings, "epsilon": origin.epsilon, **OF_ANY_SIZE})
    source = Store(originals) if originals else None
    problems = [
        f"{name}: in the output without a row in the ledger, so it does not count"
        for name in strangers(output, str(origin.settings["encode"]))
    ]
    result = ShardCheck("", problems, files=0)
    total = sum(1 for _ in written_rows(output))
    share = min(1.0, max(share, LEAST_DECODED / max(1, total)) if share else 0.0)
    check_row = partial(verify_row, output=output, source=source, settings=settings, decode_share=share)
    _added(result, total, bounded_map(pool, check_row, written_rows(output), ahead=AHEAD))
    if source is not None and total and not result.num_compared:
        result.problems.append(f"{source.url}: has none of the originals as they were when they were protected")
    return result


def _shard_names(there: set[str]) -> Iterator[str]:
    commits, ending = f"{layout.COMMITS}/", ".json"
    return (name[len(commits) : -len(ending)] for name in there if name.startswith(commits))


def _check(
    output: Store,
    source: Store | None,
    shard: str,
    *,
    units: Mapping[str, Shard],
    record: RunRecord,
    settings: VerifySettings,
    share: float,
) -> ShardCheck:
    name = layout.commit(shard)
    commit = Commit.from_bytes(output.read(name), f"{output.url}/{name}")
    refused = read_quarantine(output, layout.quarantine(shard)) if commit.num_quarantined else []
    quarantined = {rejection.key for rejection in refused}
    try:
        check = _compared(commit, output, source, units, quarantined, settings, share)
    except InputError as error:
        check = ShardCheck(shard, [str(error)])
    check.lost = losses_of(shard, refused)
    check.written = [file.name for image in commit.images for file in image.files] if commit.images else [shard]
    check.input_image_bytes, check.output_image_bytes = commit.input_image_bytes, commit.output_image_bytes
    check.num_reread, check.survival = commit.num_reread, commit.survival
    if commit.fingerprint != record.fingerprint:
        check.fail("", f"its commit has fingerprint {commit.fingerprint[:16]}, the run {record.fingerprint[:16]}")
    return check


def _compared(
    commit: Commit,
    output: Store,
    source: Store | None,
    units: Mapping[str, Shard],
    quarantined: set[str],
    settings: VerifySettings,
    share: float,
) -> ShardCheck:
    """A shard, or a unit of loose images, compared with its commit and its originals. Raises InputError."""
    if commit.shard in units or commit.images:
        limit, unit = settings.max_member_bytes, units.get(commit.shard)
        theirs = samples_of(source, unit, max_member_bytes=limit, any_version=True) if source and unit else None
        check = verify_images(commit, output, theirs, quarantined, settings=settings, decode_share=share)
        if source is not None and unit is None:
            check.fail("", f"not compared with its originals: {layout.PLAN}, which names them, is missing or lacks it")
        return check
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(output.open(commit.shard))
        original = stack.enter_context(source.open(commit.shard)) if source else None
        return verify_shard(Expected.of(commit), ours, original, quarantined, settings=settings, decode_share=share)


def _missing(committed: list[str], record: RunRecord) -> list[str]:
    """What is planned but not committed."""
    if len(committed) == record.num_shards:
        return []
    return [
        f"{record.num_shards - len(committed)} of {record.num_shards} shards are not committed: "
        "run the protection job again to finish"
    ]


def print_result(found: ShardCheck, *, with_originals: bool, is_uploads: bool) -> None:
    """Print what was checked, the first problems, and the verdict."""
    print(f"files        {found.files} re-read and re-hashed")
    print(f"samples      {found.num_samples} counted, {found.num_decoded} decoded")
    if with_originals and found.files:
        if is_uploads:
            rest = "; of the others that version is gone" if found.num_compared < found.files else ""
            print(f"originals    {found.num_compared} of {found.files} files compared{rest}")
        if found.num_decoded:
            exact = f"in {found.num_exact} files written without loss"
            print(f"epsilon      largest change {found.max_exact_delta} levels {exact}")
            print(
                f"             largest change {found.max_abs_delta} levels in any decoded file, lossy codecs included"
            )
        else:
            print("epsilon      not checked: no file was decoded (--decode 1 decodes all)")
    if found.input_image_bytes:
        print(f"size         {found.output_image_bytes / found.input_image_bytes:.2f} x the original image files")
    if found.num_reread:
        share = found.survival / found.num_reread
        print(
            f"delta        {share:.1%} left in the files: mean of {found.num_reread:,} decoded when they were written"
        )
    for line in found.problems[:50]:
        print(f"problem      {line}")
    print(f"result       {f'{len(found.problems)} problems' if found.problems else 'ok'}")
