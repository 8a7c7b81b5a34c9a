"""Whatever can be refused is refused here, before Ray starts: settings, input, output, weights, keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from jobs.shared import cli
from jobs.shared.inputs import check_finished
from pipeline import layout
from pipeline.deltas.artefact import named_surrogate
from pipeline.deltas.load import AnyProtection, load_protection
from pipeline.errors import ConflictError, InputError, ScumbleError, SettingsError
from pipeline.fitting.fit_images import shorter_sides
from pipeline.hashing import sha256
from pipeline.layout import RUN_FOLDER
from pipeline.records import Plan, Rejection, Shard, quarantine_to_bytes
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.plan import make_plan, plan_to_parquet, planned_shards
from pipeline.runs.run_record import RunRecord, check_same_run, read_run
from pipeline.settings import FEWEST_CLUSTERS, OF_THE_FIT, ApplySettings, Settings, flag
from pipeline.shards.inputs import Listing, resolve_input, said_of, told_of_others, without_unwritable
from pipeline.shards.names import output_name
from pipeline.shards.samples import samples_of_all
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store, file_at
from pipeline.surrogates.surrogate import Surrogate, check_surrogate, known_surrogate, size_for

_LOOKED_AT = 16  # first usable images, which tell whether a collection is one of small images
_WAYS = ("same", "lossless", "jpeg:95")  # of --encode, by which names of images differ
_TRIED = 1_000  # samples at most, to find so many


@dataclass(frozen=True)
class Run:
    """A protection run that was checked and may start."""

    settings: Settings
    source: Store
    output: Store
    plan: Plan
    surrogate: Surrogate  # on the driver, for its identity and for estimates
    given: AnyProtection | None  # by --protection
    key: bytes | None  # secret of the texture generator
    record: RunRecord
    passed_over: tuple[Rejection, ...] = ()  # of the input, what may hold images and is not read
    others: Sequence[str] = ()  # of the input, names of what is neither read nor copied

    @property
    def is_universal(self) -> bool:
        """True if a universal generator is applied, which embeds each image as it comes."""
        return self.settings.method == "one-for-all"

    @property
    def summary(self) -> str:
        plan = self.plan
        lines = [
            f"input        {self.settings.input}: {plan.contents}, {plan.total_bytes / 1e6:,.1f} MB",
            f"output       {self.settings.output}",
            f"fingerprint  {plan.fingerprint[:16]}",
        ]
        if plan.done:
            lines.append(f"committed    {len(plan.done)} shards, {len(plan.left)} left")
        if self.others:
            lines.append(f"not copied   {told_of_others(self.others)}")
        if self.passed_over:
            lines.append(f"passed over  {said_of(self.passed_over)}")
        return "\n".join(lines)


def prepare(settings: Settings) -> Run:
    """List the input once, check everything, compute the fingerprint, find the commits.

    Raises a one-line ScumbleError for anything that would break the run later.
    """
    check_surrogate(settings.surrogate)
    output = Store(settings.output)
    listing = without_unwritable(
        resolve_input(settings.input, settings.keep_sidecar),
        output,
        layout.assignment,
        partial(output_name, encode=settings.encode),
    )
    source, shards = listing.store, listing.shards
    check_apart(source, output, listing.names)
    check_finished(source, shards)
    key = cli.read_key(settings.key_file)
    given, protection_sha256 = _read_protection(settings, key)
    if given is not None:
        if idle := sorted(settings.given & OF_THE_FIT):
            cli.warn(f"no effect with --protection, which is not fitted again: {', '.join(map(flag, idle))}")
        settings = _as_fitted(settings, given)
    _check_enough_images(settings, source, shards)
    settings, surrogate = _with_surrogate(settings, source, shards)
    if given is not None:
        given.check_surrogate(surrogate.id)
    ingredients = ingredients_of(
        settings,
        shards,
        weights_sha256=surrogate.weights_sha256,
        protection_sha256=protection_sha256,
        key_sha256=sha256(key) if key else None,
    )
    record = RunRecord.of(ingredients, settings, make_plan(shards, ingredients.fingerprint, ()))
    committed = committed_shards(settings, output, record, written_names(listing, settings))
    plan = make_plan(shards, ingredients.fingerprint, committed)
    return Run(
        settings, source, output, plan, surrogate, given, key, record, tuple(listing.passed_over), listing.others
    )


def start_run(run: Run) -> None:
    """Write the record of the run into the output, so that no other run can write there."""
    if not run.output.honours_create():
        cli.warn(f"{run.settings.output} does not support create-if-absent: never run two jobs on it at once")
    if not run.output.create(layout.RUN, run.record.to_bytes()):
        check_same_run(read_run(run.output), run.record, run.settings.output)
    run.output.sweep()
    if run.output.info(layout.PLAN) is None:
        run.output.put(layout.PLAN, plan_to_parquet(run.plan))
    if run.passed_over:
        run.output.put(layout.PASSED_OVER, quarantine_to_bytes(run.passed_over))
    else:  # what an earlier start noted may be obsolete
        run.output.delete([layout.PASSED_OVER])


def is_left(run: Run) -> bool:
    """True unless an earlier start has committed and measured every shard."""
    return bool(run.plan.left) or run.output.info(layout.GALLERY) is None


def _read_protection(settings: Settings, key: bytes | None) -> tuple[AnyProtection | None, str | None]:
    if settings.protection is None:
        if settings.method == "one-for-all":
            raise SettingsError(
                "--method one-for-all applies a generator from jobs/train_one_for_all.py: add --protection FILE"
            )
        return None, None
    store, name = file_at(settings.protection)
    try:
        data = store.read(name)
    except ScumbleError:
        if Store(settings.protection).info(layout.PROTECTION) is None:
            raise
        folder = settings.protection.rstrip("/")
        raise SettingsError(f"--protection {folder} is a folder: name {folder}/{layout.PROTECTION}") from None
    try:
        protection = load_protection(data)
    except InputError as error:
        raise InputError(f"--protection {settings.protection}: {error}") from None
    if protection.method not in settings.METHODS:
        raise SettingsError(f"{settings.protection} is of the method {protection.method}, which is only compared with")
    if "method" in settings.given and protection.method != settings.method:
        raise SettingsError(f"{settings.protection} was made with method {protection.method}: omit --method")
    if "epsilon" in settings.given and settings.epsilon != protection.epsilon:
        raise SettingsError(
            f"--epsilon {settings.epsilon * 255:g}/255: {settings.protection} was made for "
            f"{protection.epsilon * 255:g}/255; omit --epsilon, or fit a new one"
        )
    if protection.needs_key:
        if key is None:
            raise SettingsError(f"{settings.protection} needs the secret that it was made with: add --key-file FILE")
        protection.with_key(key)  # raises if it is another secret; the run hands the key itself to its actors
    elif key is not None:
        raise SettingsError(f"{settings.protection} was made without a secret: omit --key-file")
    return protection, sha256(data)


def _as_fitted(settings: Settings, given: AnyProtection) -> Settings:
    """The settings with what the protection dictates: method, epsilon, and the surrogate unless the user names one."""
    name, size = named_surrogate(given.surrogate_id)
    chosen: dict[str, Any] = {"method": given.method, "epsilon": given.epsilon}
    if "surrogate" not in settings.given:
        chosen["surrogate"] = name
    if "surrogate_size" not in settings.given and chosen.get("surrogate", settings.surrogate) == name:
        chosen["surrogate_size"] = size
    return replace(settings, **chosen)


def _with_surrogate(settings: Settings, source: Store, shards: list[Shard]) -> tuple[Settings, Surrogate]:
    """The surrogate, and the settings with the side at which it sees images where the user leaves that open."""
    surrogate = known_surrogate(settings)
    is_open = settings.surrogate_size is None and settings.size == "native" and settings.protection is None
    if is_open and surrogate.is_convolutional and (size := size_for(_first_sides(settings, source, shards))):
        settings = replace(settings, surrogate_size=size)
        surrogate = known_surrogate(settings)
    return settings, surrogate


def _first_sides(settings: Settings, source: Store, shards: list[Shard]) -> list[int]:
    """Shorter sides in pixels of the first usable images; none if none of the first samples can be read."""
    samples = samples_of_all(source, shards, max_member_bytes=settings.max_member_bytes)
    with contextlib.suppress(InputError):
        return shorter_sides(islice(samples, _TRIED), limit=_LOOKED_AT, max_pixels=settings.max_pixels)
    return []


def _check_enough_images(settings: Settings, source: Store, shards: list[Shard]) -> None:
    """Read until there are as many samples as clusters; usually the first few members settle it."""
    if settings.protection is not None or (settings.clusters is None and settings.method != "uc"):
        return
    needed, count = settings.clusters or FEWEST_CLUSTERS, 0
    for sample in samples_of_all(source, shards, max_member_bytes=settings.max_member_bytes):
        count += not isinstance(sample, Rejection)
        if count >= needed:
            return
    if settings.clusters is None or count < FEWEST_CLUSTERS:
        what = f"the input has {count} image{'s' * (count != 1)}, and clusters need at least {FEWEST_CLUSTERS}"
        raise SettingsError(f"{what}: add images, or give a --protection that was fitted on others")
    raise SettingsError(f"--clusters {settings.clusters}: the input has only {count} images; choose fewer clusters")


def written_names(listing: Listing, settings: ApplySettings) -> set[str]:
    """Names that a run writes; to overwrite an older one, also those it has under other settings of --encode."""
    ways = _WAYS if isinstance(settings, Settings) and settings.overwrite else (settings.encode,)
    names = set(listing.names)
    return names.union(name for shard in listing.shards for name in _image_names(shard, ways))


def _image_names(shard: Shard, ways: Sequence[str]) -> Iterator[str]:
    """Names in the output of the loose images of a unit."""
    return (output_name(image.files[0].name, way) for image in shard.images for way in ways)


def _names_of_another(output: Store) -> set[str]:
    """Names that an earlier run wrote, by its commits and its plan; its input may have been another."""
    names = set(_committed(output))
    if data := output.read_if_there(layout.PLAN):
        with contextlib.suppress(InputError):
            for shard in planned_shards(data, f"{output.url}/{layout.PLAN}"):
                names.add(shard.name)
                names.update(_image_names(shard, _WAYS))
                names.update(file.name for image in shard.images for file in image.files)
    return names


def committed_shards(settings: Settings, output: Store, record: RunRecord, names: Set[str]) -> list[str]:
    """Names of the shards with a commit in the output, after making sure that the output belongs to this run.

    names  of all files that the run may write
    """
    existing = output.read_if_there(layout.RUN)
    if existing is None and (stranger := first_held(output, names)):  # it may be the input under another name
        raise ConflictError(held_by_a_stranger(settings.output, stranger))
    if settings.overwrite:
        if not settings.dry_run:
            _remove_run(output, names | _names_of_another(output) if existing is not None else names)
        return []
    if existing is not None:
        theirs = RunRecord.from_bytes(existing, f"{output.url}/{layout.RUN}")  # one to be overwritten may be damaged
        check_same_run(theirs, record, settings.output)
    return _committed(output)


def _remove_run(output: Store, names: Set[str]) -> None:
    """Delete what a run has written, in an order that can be stopped anywhere.

    names  of the protected files
    What is there is never called committed without its files, and until the last the plan tells what there may be and
    the record whose it is.
    """
    phases: tuple[list[str], ...] = ([], [], [], [], [])
    for name in output.names():
        if name.startswith(f"{layout.COMMITS}/"):
            phases[0].append(name)
        elif not name.startswith(f"{RUN_FOLDER}/"):
            phases[1].extend([name] if name in names else [])
        else:
            phases[3 if name == layout.PLAN else 4 if name == layout.RUN else 2].append(name)
    for phase in phases:
        output.delete(phase)


def _committed(output: Store) -> list[str]:
    """Names of the shards and units that have a commit."""
    commits, ending = f"{layout.COMMITS}/", ".json"
    return [name[len(commits) : -len(ending)] for name in output.names(layout.COMMITS) if name.endswith(ending)]


def first_held(output: Store, names: Set[str]) -> str | None:
    """The first of the names, in sorted order, that exists in the output."""
    return min((name for name in output.names() if name in names), default=None)


def held_by_a_stranger(url: str, name: str) -> str:
    """The error for an output with a file of that name from elsewhere."""
    return f"{url} holds {name}, which no run of Scumble wrote: choose another --output"
