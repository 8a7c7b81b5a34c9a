"""The steps of a relearning evaluation: check, load, plan, train what is left, write the results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from actors.cluster.connect import Workers, workers_for
from actors.cluster.failures import ray_failures
from actors.denoisers import make_denoiser
from actors.trials import (
    EvaluationData,
    LoadedLabels,
    Loading,
    check_collections,
    digest_of,
    label_collection,
    load_collection,
    make_arm,
    run_trials,
    sample_limit,
    shared_rows,
    side_of,
)
from jobs.evaluation.metrics import RelearnedSoFar
from jobs.shared import cli
from jobs.shared.inputs import list_labelled
from jobs.shared.progress import progress
from pipeline import layout
from pipeline.errors import ClusterError, InputError, SettingsError
from pipeline.hashing import sha256
from pipeline.measures.cpus import available_cpus
from pipeline.records import Shard
from pipeline.relearning.checks import check_regime, check_targets
from pipeline.relearning.collection import median_side
from pipeline.relearning.denoisers.denoiser import DenoiserRecipe
from pipeline.relearning.estimate import estimate_evaluation
from pipeline.relearning.evaluation import (
    CLEAN,
    CLEAN_PART,
    LEAKED_PAIRS,
    SELF_PAIRS,
    SETTINGS,
    EvaluationSettings,
    Trial,
)
from pipeline.relearning.labels.files import read_label_files
from pipeline.relearning.labels.given import class_numbers
from pipeline.relearning.report.results import outdated
from pipeline.relearning.targets import check_target
from pipeline.relearning.training import recipe_of
from pipeline.report.page import duration, size
from pipeline.runs.run_record import RunRecord
from pipeline.settings import Size, apply_settings
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store

LARGEST_SIDE, SMALLEST_SIDE = 224, 32
_Stores = Mapping[str, tuple[Store, list[Shard]]]  # name -> store, and shards or units, of a collection
PACKAGES = ("torch", "torchvision", "timm", "kornia", "ray", "numpy")


@dataclass(frozen=True)
class Loaded:
    """The collections in the object store, their digests, and how many samples of each could not be read.

    side, kept  of what targets see, and of the images that it is cut out of
    """

    output: Store
    side: int
    kept: int
    clean: Any
    test: Any
    arms: dict[str, Any]
    everywhere: Any
    labels: dict[str, LoadedLabels]
    digests: dict[str, str]
    workers: Workers
    left_out: dict[str, int]
    denoisers: dict[str, Denoising]


@dataclass(frozen=True)
class Denoising:
    """A reference to the denoiser of a regime, and its digest."""

    reference: Any
    digest: str


def check_names(settings: EvaluationSettings) -> None:
    """Raise SettingsError for an unknown surrogate or option of a regime, before any picture is read.

    Raises InputError for a file of labels that cannot be read.
    """
    read_label_files(settings.labellings, settings.classes, settings.concepts)
    for target in settings.targets:
        check_target(target)
    for regime in settings.regimes:
        check_regime(regime)


def load_collections(settings: EvaluationSettings) -> Loaded:
    """Decode every collection once. Raises SettingsError if they do not match each other."""
    with _refused(), ray_failures():
        workers = workers_for(settings)
        stores, pairs = _stores(settings), _pair_stores(settings)
        sizes = _sizes(stores)
        side = settings.side or (LARGEST_SIDE if sizes[CLEAN] == "224" else _side(*stores[CLEAN]))
        if sizes[CLEAN] == "224":
            print("geometry     the centre of 224 px that a protected copy stores, of all other pictures as well")
        kept = recipe_of(settings.changed_recipe).kept_side(side)
        data, left_out = _decoded(settings, stores, sizes, kept)
        clean, test = data.pop(CLEAN), data.pop("test")
        check_collections(clean, test, settings, side)
        arms = _arms(settings, stores, sizes, data, (clean, test))
        everywhere, missing = shared_rows(clean, list(arms.values()))
        files = read_label_files(settings.labellings, settings.classes, settings.concepts)
        labels = {name: label_collection(name, clean, test, arms, files) for name in settings.labellings}
        digests = {CLEAN: digest_of(settings.holdout, clean, test)}
        digests[CLEAN_PART] = sha256(f"{digests[CLEAN]} {missing}".encode()) if missing else digests[CLEAN]
        digests |= {name: digest_of(settings.holdout, clean, test, data[name]) for name in settings.arms}
        trained = train_denoisers(settings, workers, kept, pairs, (clean, test))
        output = Store(settings.output)
        return Loaded(output, side, kept, clean, test, arms, everywhere, labels, digests, workers, left_out, trained)


def _decoded(
    settings: EvaluationSettings, stores: _Stores, sizes: Mapping[str, Size], side: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """References to all collections by name, and how many samples of each could not be read."""
    loading: dict[str, Loading] = {}
    left_out: dict[str, int] = {}
    classes = _classes(stores)
    limit = settings.images and sample_limit(*stores[CLEAN], settings.images)
    with progress("load", len(stores), "collection") as bar:
        for name, (store, entries) in stores.items():
            bound = None if name == "test" else limit
            loading[name] = load_collection(store, entries, side, bound, classes=classes, size=sizes[name])
        for name, collection in loading.items():
            if left := cli.print_left_out(collection.wait()):
                left_out[name] = left
            bar.step(name)
    return {name: collection.reference for name, collection in loading.items()}, left_out


def _classes(stores: _Stores) -> Mapping[str, int]:
    """The labels of class folders, said to the user; {} if labels are numbers. Raises as class_numbers does."""
    classes = class_numbers({name: entries for name, (_, entries) in stores.items()})
    if classes:
        print(f"labels       the first folder of every image: {len(classes):,} classes, in sorted order")
    return classes


def _arms(
    settings: EvaluationSettings,
    stores: _Stores,
    sizes: Mapping[str, Size],
    data: Mapping[str, Any],
    clean_and_test: tuple[Any, Any],
) -> dict[str, Any]:
    """References to the Arm of every protected collection. Raises InputError for one that does not match."""
    making = {
        name: make_arm(name, stores[name][0], data[name], *clean_and_test, test_shards=stores["test"], size=sizes[name])
        for name in settings.arms
    }
    for name, arm in making.items():
        if why := arm.wait():
            print(f"own delta    not tested for {name}: {why}")
    return {name: arm.reference for name, arm in making.items()}


def train_denoisers(
    settings: EvaluationSettings,
    workers: Workers,
    side: int,
    pair_stores: Sequence[tuple[Store, list[Shard]]],
    evaluated: tuple[Any, ...],
) -> dict[str, Denoising]:
    """Train the denoisers that regimes share, or find them in the output; prints how much each gains.

    evaluated  references to the Collections that no picture of the pairs may be in
    """
    if not settings.denoisers():
        return {}
    pairs = []
    sizes = _sizes({str(number): pair for number, pair in enumerate(pair_stores)})
    for (store, entries), geometry in zip(pair_stores, sizes.values(), strict=True):
        loading = load_collection(store, entries, side, has_labels=False, size=geometry)
        cli.print_left_out(loading.wait())
        pairs.append(loading.reference)
    output, both = Store(settings.output), (pairs[0], pairs[1]) if pairs else None
    making = {
        name: make_denoiser(name, output, side, workers, pairs=both, evaluated=evaluated)
        for name in settings.denoisers()
    }
    trained = {}
    with progress("denoise", len(making), "denoiser") as bar:
        for name, made in making.items():
            facts = made.wait(None)
            bar.step(name)
            on = f"{facts.num_pictures:,} {'pairs' if name == SELF_PAIRS else 'pictures'}"
            how = f"{facts.num_steps:,} steps" if facts.is_new else "trained before"
            print(f"denoiser     {name}: gains {facts.gain_db:.1f} dB on the held-out part of its {on}; {how}")
            trained[name] = Denoising(made.reference, facts.digest)
    return trained


def plan(settings: EvaluationSettings, loaded: Loaded) -> list[Trial]:
    """All trials; prints how many there are."""
    labels = {name: found.digest for name, found in loaded.labels.items()}
    cleaning = {name: found.digest for name, found in loaded.denoisers.items()}
    trials = settings.trials(loaded.digests, labels, cleaning | {LEAKED_PAIRS: DenoiserRecipe().digest()})
    loaded.output.put(SETTINGS, json.dumps(asdict(settings), indent=1, default=str).encode())
    print(f"collections  clean and {len(settings.arms)} protected, {_at(loaded.side, loaded.kept)}")
    if loaded.left_out:
        print(f"left out     {', '.join(f'{name} {count:,}' for name, count in loaded.left_out.items())} unreadable")
    print(f"trials       {len(trials)}, {loaded.workers.count} at a time")
    if old := outdated(trials, loaded.output):
        print(f"not reused   {old} trials of an earlier version of this program, which computed them differently")
    return trials


def print_trials(settings: EvaluationSettings) -> int:
    """Print what the evaluation would take, estimated from a trial run here; uses no Ray and writes nothing."""
    stores = _stores(settings)
    store, entries = stores[CLEAN]
    is_cropped = _sizes(stores)[CLEAN] == "224"
    side = settings.side or (LARGEST_SIDE if is_cropped else _within(median_side(store, entries)))
    kept = recipe_of(settings.changed_recipe).kept_side(side)
    check_targets(settings.targets, settings.regimes, 2, side)
    estimate = estimate_evaluation(settings, stores, kept, _classes(stores), _pair_stores(settings))
    workers = settings.workers or available_cpus()
    counts = ", ".join(f"{name} {count:,}" for name, count in estimate.images.items())
    print(f"images       about {counts}, {_at(side, kept)}")
    print(f"trials       {estimate.trials}, {workers} at a time")
    print(
        f"memory       {size(estimate.shared_bytes)} per node, plus {size(estimate.trial_bytes)} for each trial on it"
    )
    spent = duration(estimate.seconds / min(workers, estimate.trials))
    print(f"time         about {spent}: {settings.targets[0]} under nt as measured here; others may take far longer")
    if estimate.denoiser_seconds:
        each = f"at most {duration(estimate.denoiser_seconds)} each, as measured on a CPU here"
        shared = [f"one for {name}, before the trials" for name in settings.denoisers()]
        own = [f"{estimate.num_leaked} for leaked pairs, one per trial"] if estimate.num_leaked else []
        print(f"denoisers    {each}: {'; '.join(shared + own)}")
    return cli.DONE


def unfinished(trials: Sequence[Trial], output: Store) -> list[Trial]:
    """The trials without a result."""
    have = set(output.names("trials"))
    return [trial for trial in trials if trial.result not in have]


def left_of(trials: Sequence[Trial], output: Store) -> list[Trial]:
    """The trials without a result yet; prints how many are finished."""
    left = unfinished(trials, output)
    if len(left) < len(trials):
        print(f"finished     {len(trials) - len(left)} trials, {len(left)} left")
    return left


def train_targets(settings: EvaluationSettings, loaded: Loaded, trials: Sequence[Trial]) -> None:
    """Run the trials that have no result yet in Tune."""
    left = left_of(trials, loaded.output)
    if not left:
        return
    so_far = RelearnedSoFar(settings, loaded.output, [trial for trial in trials if trial not in left])
    facts = {(arm, name): row for name, found in loaded.labels.items() for arm, row in found.facts.items()}
    data = EvaluationData(
        output=loaded.output,
        clean=loaded.clean,
        test=loaded.test,
        arms=loaded.arms,
        labels={name: found.labels for name, found in loaded.labels.items()},
        everywhere=loaded.everywhere,
        facts=facts,
        holdout=settings.holdout,
        side=loaded.side,
        versions=" ".join(f"{package} {version(package)}" for package in PACKAGES),
        device=loaded.workers.device,
        threads=loaded.workers.threads,
        denoisers={name: found.reference for name, found in loaded.denoisers.items()},
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends this job like any other: every epoch is kept anyway
    with ray_failures(), progress("relearn", len(left), "trial", loaded.output) as bar:

        def done(trial: Trial) -> None:
            bar.step(trial.name)
            so_far.add(trial)

        run_trials(left, data, cpus=loaded.workers.cpus, gpus=loaded.workers.gpus, done=done)
    if stopped := unfinished(left, loaded.output):
        raise ClusterError(
            f"stopped with {len(stopped)} of {len(trials)} trials left; run the same command again to resume"
        )


def _side(store: Store, entries: Sequence[Any]) -> int:
    """Median shorter side of the first usable images, within what targets are built for."""
    return _within(side_of(store, entries))


def _at(side: int, kept: int) -> str:
    return f"at {side} px" if kept == side else f"at {kept} px, of which targets see {side}"


def _within(side: int) -> int:
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, side))


def _stores(settings: EvaluationSettings) -> dict[str, tuple[Store, list[Shard]]]:
    """Store and shards or units of every collection. Raises InputError, SettingsError if the output is inside one."""
    urls = {CLEAN: settings.clean, "test": settings.test, **settings.arms}
    stores = {name: list_labelled(url) for name, url in urls.items()}
    for name, (store, _) in stores.items():
        check_apart(store, Store(settings.output), may_hold=True, what=f"the collection {name}")
    for flag, name in (("--clean", CLEAN), ("--test", "test")):
        if stores[name][0].info(layout.RUN) is not None:
            raise SettingsError(f"{flag} {urls[name]} is the output of a protection run: name the originals")
    if (stores[CLEAN][0].root, stores[CLEAN][1]) == (stores["test"][0].root, stores["test"][1]):
        raise SettingsError(f"--test and --clean are both {settings.clean}: name images that no target is trained on")
    return stores


def _sizes(stores: _Stores) -> dict[str, Size]:
    """How each collection is loaded, so that all show the same part of their pictures.

    If a protected copy stores the centre of 224 px, that centre is cut out of everything that does not; its clean
    control is the same crop.
    """
    cropped = {name for name, (store, _) in stores.items() if _stored_size(store) == "224"}
    return {name: "224" if cropped and name not in cropped else "native" for name in stores}


def _stored_size(store: Store) -> Size:
    """--size of the run that wrote a collection; native if no run did."""
    record = RunRecord.read(store, layout.RUN)
    return "native" if record is None else apply_settings(record.ingredients.settings).size


def _pair_stores(settings: EvaluationSettings) -> list[tuple[Store, list[Shard]]]:
    """Store and shards of --pairs, if they are given. Raises as _stores does."""
    stores = [list_labelled(url) for url in settings.pairs or ()]
    for store, _ in stores:
        check_apart(store, Store(settings.output), may_hold=True, what="--pairs")
    return stores


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Refuse unsuitable data like unsuitable options: before any training, with exit code 2."""
    try:
        yield
    except InputError as error:
        raise SettingsError(str(error)) from None
