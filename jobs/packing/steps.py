"""The steps of packing and unpacking: check and plan, do what has no commit yet, count."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.shared import cli
from jobs.shared.inputs import check_finished
from jobs.shared.progress import progress
from pipeline import layout
from pipeline.errors import ConflictError, InputError, PromiseError
from pipeline.hashing import canonical, codec_versions, sha256
from pipeline.packing.arrays import ArraySource
from pipeline.packing.pack import Packing, PackIngredients, PackRecord, pack_commits
from pipeline.packing.plan import PackPlan, plan_pack
from pipeline.packing.settings import PackSettings, UnpackFormat, UnpackSettings
from pipeline.packing.sources import source_for
from pipeline.packing.unpack import LABELS, Unpacking, parquet_name, write_labels
from pipeline.records import Rejection, Shard, quarantine_to_bytes
from pipeline.runs.run_record import check_same_run
from pipeline.shards.inputs import resolve_input, said_of
from pipeline.storage.bounded import bounded_map
from pipeline.storage.places import check_apart, check_is_folder
from pipeline.storage.store import Store

_THREADS = 4  # of a run without Ray; each packs or unpacks one shard


@dataclass(frozen=True)
class PackRun:
    """A run of `pack` that was checked and may start."""

    settings: PackSettings
    output: Store
    plan: PackPlan
    record: PackRecord
    task: Packing
    format: str

    @property
    def foreseen(self) -> int:
        """The exit code as far as the plan tells."""
        return cli.QUARANTINED if self.plan.left.rejections else cli.DONE

    @property
    def summary(self) -> str:
        plan, labelled = self.plan, sum(label >= 0 for label in self.plan.rows["label"].to_pylist())
        rows, left = len(plan.rows), plan.left
        lines = [
            f"input        {self.settings.input}: {self.format}, {rows:,} images, {plan.image_bytes / 1e6:,.1f} MB",
            f"classes      {len(plan.classes):,}"
            + (f"; {rows - labelled:,} images without" if labelled < rows else ""),
            f"output       {self.settings.output}: {len(plan.shards):,} shards",
        ]
        if left.others:
            lines.append(f"other files  {left.others:,} are not packed, e.g. {', '.join(left.first_others)}")
        if left.rejections:
            lines.append(f"passed over  {said_of(left.rejections)}")
        return "\n".join(lines)


def prepare_pack(settings: PackSettings) -> PackRun:
    """List the input once, check everything, decide what goes where. Raises a ScumbleError; writes nothing."""
    output = Store(settings.output)
    found = source_for(settings)
    source, kind = found.source, found.format
    check_is_folder(output)
    if not found.is_file:  # beside a single file there is room: what exists is never overwritten
        check_apart(found.store, output)
    plan = plan_pack(source, settings, found.beside)
    versions = codec_versions() if isinstance(source, ArraySource) else {}
    ingredients = PackIngredients(settings.deciding, plan.sha256, versions)
    record = PackRecord.of(ingredients, settings.input, len(plan.shards))
    _check_output(output, record, [shard.name for shard in plan.shards])
    return PackRun(settings, output, plan, record, Packing(source, output, record.fingerprint, plan.classes), kind)


def _check_output(output: Store, record: PackRecord, names: Sequence[str]) -> None:
    """Raise ConflictError if the output belongs to another run, or has files that this run would write."""
    existing = PackRecord.read(output, layout.PACK_RUN)
    if existing is not None:
        check_same_run(existing, record, output.url, overwrite=False)
    elif output.info(layout.RUN) is not None:
        raise ConflictError(f"{output.url} is the output of a protection run: choose another --output")
    else:
        held = set(names).intersection(output.names())
        if held:
            raise ConflictError(f"{output.url} holds {min(held)}, which no run wrote: choose another --output")


def start_pack(run: PackRun) -> None:
    """Claim the output for this run; write the plan that workers read, the classes, and what is passed over."""
    output, plan = run.output, run.plan
    claim_output(output, run.record)
    if output.info(layout.PACK_PLAN) is not None:
        return
    output.put(layout.PACK_CLASSES, "".join(f"{name}\n" for name in plan.classes).encode())
    if plan.left.rejections:
        output.put(layout.PACK_PASSED_OVER, quarantine_to_bytes(plan.left.rejections))
    file = io.BytesIO()
    with pq.ParquetWriter(file, plan.rows.schema) as writer:
        for number in range(len(plan.shards)):
            rows = plan.of_shard(number)
            writer.write_table(rows, row_group_size=len(rows))
    output.put(layout.PACK_PLAN, file.getvalue())


def claim_output(output: Store, record: PackRecord) -> None:
    """Create the record of a run. Raises ConflictError if another run was faster."""
    if not output.create(layout.PACK_RUN, record.to_bytes()):
        existing = PackRecord.read(output, layout.PACK_RUN)
        if existing is not None:
            check_same_run(existing, record, output.url, overwrite=False)
    output.sweep()


def over_left(
    output: Store,
    shards: Sequence[Shard],
    task: Packing | Unpacking,
    settings: PackSettings | UnpackSettings,
    stage: str,
) -> None:
    """Run the transaction of every shard without a commit: in this process, or with --ray on a cluster."""
    have = set(output.names(layout.PACK_COMMITS))
    left = [shard for shard in shards if layout.pack_commit(shard.name) not in have]
    if not left:
        return
    results = _on_ray(left, task, settings) if settings.ray else _here(left, task)
    with progress(stage, len(left)) as bar:
        for name, images, rejected in results:
            bar.step(name, images=images, rejected=rejected)


def _here(left: Sequence[Shard], task: Packing | Unpacking) -> Iterator[tuple[str, int, int]]:
    """In threads of this process: one reads while another waits for the disk or the store."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for commit in bounded_map(pool, task.run, left, ahead=_THREADS):
            yield commit.shard, commit.num_images, commit.num_quarantined


def _on_ray(
    left: Sequence[Shard], task: Packing | Unpacking, settings: PackSettings | UnpackSettings
) -> Iterator[tuple[str, int, int]]:
    from actors.cluster.connect import connected, workers_for
    from actors.cluster.stream import over_shards
    from actors.packer import Packer

    with connected(settings):
        workers = replace(workers_for(settings), cpus=1.0)
        for done in over_shards(left, Packer, (task,), workers):
            yield done.name, done.images, done.rejected


def finish_pack(run: PackRun) -> int:
    """Sum the commits, print the counts, say what was left out; returns the exit code."""
    sums = _sums(run.output, run.plan.shards)
    expected = len(run.plan.rows)
    if sums["num_images"] + sums["num_quarantined"] != expected:
        raise PromiseError(
            f"{run.settings.output}: {expected:,} images were planned, but {sums['num_images']:,} written"
        )
    print(f"packed       {sums['num_images']:,} images, {sums['output_size'] / 1e6:,.1f} MB in shards")
    return _finish(run.output, sums["num_quarantined"], len(run.plan.left.rejections), "packed")


def _sums(output: Store, shards: Sequence[Shard]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for commit in pack_commits(output, shards):
        for name in ("num_images", "num_quarantined", "output_size"):
            sums[name] += getattr(commit, name)
    return sums


def _finish(output: Store, quarantined: int, passed_over: int, done: str) -> int:
    if not quarantined + passed_over:
        return cli.DONE
    where = f"{output.url}/{layout.PACK}/"
    cli.warn(f"{quarantined + passed_over:,} images, or what may hold some, were not {done}; see {where}")
    return cli.QUARANTINED


@dataclass(frozen=True)
class UnpackRun:
    """A run of `unpack` that was checked and may start."""

    settings: UnpackSettings
    output: Store
    shards: tuple[Shard, ...]
    passed_over: tuple[Rejection, ...]
    record: PackRecord
    task: Unpacking

    @property
    def foreseen(self) -> int:
        """The exit code as far as the listing tells."""
        return cli.QUARANTINED if self.passed_over else cli.DONE

    @property
    def summary(self) -> str:
        size = sum(shard.size for shard in self.shards)
        lines = [
            f"input        {self.settings.input}: {len(self.shards):,} shards, {size / 1e6:,.1f} MB",
            f"output       {self.settings.output}: {self.settings.format}",
        ]
        if self.passed_over:
            lines.append(f"passed over  {said_of(self.passed_over)}")
        return "\n".join(lines)


def prepare_unpack(settings: UnpackSettings) -> UnpackRun:
    """List the shards and check everything. Raises a ScumbleError; writes nothing."""
    output = Store(settings.output)
    listing = resolve_input(settings.input)
    source, shards = listing.store, tuple(listing.shards)
    if any(shard.images for shard in shards):
        raise InputError(f"{settings.input} holds loose images, which need no unpacking: name the shards alone")
    check_apart(source, output, listing.names)
    check_finished(source, shards)
    digest = sha256(canonical([[shard.name, shard.size, shard.etag] for shard in shards]))
    versions = {"pyarrow": pa.__version__} if settings.format == "parquet" else {}
    record = PackRecord.of(PackIngredients(settings.deciding, digest, versions), settings.input, len(shards))
    _check_output(output, record, _names_to_write(settings.format, shards))
    task = Unpacking(source, output, settings.format, record.fingerprint, settings.max_member_bytes)
    return UnpackRun(settings, output, shards, tuple(listing.passed_over), record, task)


def _names_to_write(form: UnpackFormat, shards: Sequence[Shard]) -> list[str]:
    """Files that are written whole; single images are compared with what is there.

    Raises InputError if two shards would become one file.
    """
    if form == "folder":
        return [LABELS]
    shard_of: dict[str, str] = {}
    for shard in shards:
        other = shard_of.setdefault(parquet_name(shard), shard.name)
        if other != shard.name:
            raise InputError(f"{other} and {shard.name} would both become {parquet_name(shard)}: unpack them apart")
    return list(shard_of)


def start_unpack(run: UnpackRun) -> None:
    """Claim the output for this run."""
    claim_output(run.output, run.record)
    if run.passed_over:
        run.output.put(layout.PACK_PASSED_OVER, quarantine_to_bytes(run.passed_over))


def finish_unpack(run: UnpackRun) -> int:
    """Sum the commits, write the labels that folders do not tell, print the counts; returns the exit code."""
    sums = _sums(run.output, run.shards)
    if run.settings.format == "folder" and write_labels(run.output, run.shards):
        print(f"labels       {run.settings.output}/{LABELS}")
    print(f"unpacked     {sums['num_images']:,} images, {sums['output_size'] / 1e6:,.1f} MB")
    return _finish(run.output, sums["num_quarantined"], len(run.passed_over), "unpacked")
