"""Check that an uploads output still matches its ledger: re-hash, re-read, decode a sample, check epsilon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline import layout
from pipeline.errors import InputError
from pipeline.hashing import in_sample, sha256
from pipeline.layout import RUN_FOLDER
from pipeline.measures.verify import Expected, ShardCheck, VerifySettings, compare_pictures, verify_shard
from pipeline.records import Rejection, Sample, losses_of, read_quarantine, shown
from pipeline.shards.names import output_name, sample_name
from pipeline.storage.store import Store
from pipeline.uploads.ledger import Ledger
from pipeline.uploads.names import SHARD
from pipeline.uploads.segments import Row
from pipeline.uploads.units import Item, Unit


def verify_row(
    row: Row, output: Store, source: Store | None, *, settings: VerifySettings, decode_share: float
) -> ShardCheck:
    """Compare one output object with its row and, if that version of the original is available, with the original.

    decode_share  share of images to decode, chosen by hash; 1.0 = all
    Raises StoreError if the store fails; missing or altered objects are reported as problems in the check.
    """
    try:
        if row.kind == SHARD:
            return _verify_shard(row, output, source, settings, decode_share)
        return _verify_image(row, output, source, settings, decode_share)
    except InputError as error:
        return ShardCheck(shown(row.output), [str(error)])


def strangers(output: Store, encode: str) -> Iterator[str]:
    """Names in the output without a row, such as uncommitted leftovers of a killed run; they are ignored.

    encode  --encode of the runs
    A copy whose original was replaced by one that is in quarantine has a row: it stays until a later version is
    protected.
    """
    known = set()
    for row in Ledger(output).rows():
        known.add(row.output)
        if not row.output and row.version > 1:
            known.add(row.name if row.kind == SHARD else output_name(row.name, encode))
    for entry in output.walk():
        if not entry.name.startswith(f"{RUN_FOLDER}/") and entry.name not in known:
            yield entry.name


def written_rows(output: Store) -> Iterator[Row]:
    """Rows that have an output."""
    return (row for row in Ledger(output).rows() if row.output)


def _verify_image(row: Row, output: Store, source: Store | None, settings: VerifySettings, share: float) -> ShardCheck:
    check = ShardCheck(shown(row.output), num_samples=1)
    data = output.read(row.output)
    for what, found, said in (
        ("bytes", len(data), row.output_size),
        ("SHA-256", sha256(data), row.output_sha256),
    ):
        if found != said:
            check.fail("", f"{what}: found {found}, but the ledger says {said}")
    original = source.read_if(row.name, row.etag) if source is not None else None
    check.num_compared = int(original is not None)
    if original == data:
        check.fail("", "the image is unprotected: its bytes are identical to the input's")
    if in_sample(share, settings.seed, "verify", row.output):
        before = None if original is None else _sample(row.name, original)
        compare_pictures(check, _sample(row.output, data), before, settings)
    return check


def _sample(name: str, data: bytes) -> Sample:
    key, suffix = sample_name(name)
    return Sample(key, {suffix: data})


def _verify_shard(row: Row, output: Store, source: Store | None, settings: VerifySettings, share: float) -> ShardCheck:
    expected = Expected(shown(row.output), row.output_size, row.output_sha256, row.protected)
    info = source.info(row.name) if source is not None else None
    refused: list[Rejection] = []
    if row.quarantined:
        unit = Unit((Item(row.name, row.size, row.etag, row.kind, row.version),)).id
        refused = read_quarantine(output, layout.upload_quarantine(unit))
    is_same = source is not None and info is not None and info.etag == row.etag
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(output.open(row.output))
        theirs = stack.enter_context(source.open(row.name)) if source is not None and is_same else None
        quarantined = {rejection.key for rejection in refused}
        check = verify_shard(expected, ours, theirs, quarantined, settings=settings, decode_share=share)
    check.num_compared = int(is_same)
    check.lost = losses_of(shown(row.name), refused)
    return check
