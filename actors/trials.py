"""The part of an evaluation in Ray: collections decoded once into the object store, and Tune trials that train.

The result of a trial is a file in the output, and so is its last epoch while it trains. So a finished trial is never
repeated and a killed one resumes, whatever is left of the state of Tune.
"""

from __future__ import annotations

import heapq
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import tune

from actors.cluster.failures import ours_in
from actors.cluster.metrics import recorder
from pipeline.errors import ClusterError, ScumbleError
from pipeline.hashing import sha256
from pipeline.metrics import RESTARTED
from pipeline.records import Shard
from pipeline.relearning.arms import (
    Arm,
    Labels,
    arm_of,
    label_both,
    overlap_columns,
)
from pipeline.relearning.checks import check_labels, check_regime, check_shares, check_targets
from pipeline.relearning.collection import (
    Collection,
    check_classes,
    check_unlike,
    holdout_mask,
    join,
    load_labelled,
    median_side,
    smallest_hashes,
)
from pipeline.relearning.denoisers.denoiser import Denoiser
from pipeline.relearning.evaluation import CLEAN, CLEAN_PART, COMPUTATION, EvaluationSettings, Trial, denoisers_of
from pipeline.relearning.labels.files import LabelFiles
from pipeline.relearning.report.certificate import scores_of
from pipeline.relearning.training import Training
from pipeline.relearning.trial import run_trial
from pipeline.settings import Size
from pipeline.shards.squares import LeftOut
from pipeline.storage.store import Store

LOAD_SECONDS = 6 * 3600.0
RESTARTS = 3
LOOKED_AT = 100  # images of every fit on which a certificate measures how visible the deltas are


@dataclass(frozen=True)
class EvaluationData:
    """References to everything that trials read; in the object store once per node.

    arms       arm -> Arm
    labels     labelling -> Labels
    everywhere  which clean images all arms have, see shared_rows
    facts      (arm, labelling) -> columns of its rows
    denoisers  regime -> the Denoiser that it cleans with
    """

    output: Store
    clean: Any
    test: Any
    arms: Mapping[str, Any]
    labels: Mapping[str, Any]
    everywhere: Any
    facts: Mapping[tuple[str, str], Mapping[str, float]]
    holdout: float
    side: int
    versions: str
    device: str
    threads: int
    denoisers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loading:
    """References to what a task puts into the object store, and to the little that the driver needs to know."""

    reference: Any
    receipt: Any

    def wait(self, seconds: float | None = LOAD_SECONDS) -> Any:
        """What the driver needs to know, once the value exists. Raises what the task raises, wrapped by Ray.

        seconds  timeout; None: none
        """
        return ray.get(self.receipt, timeout=seconds)


def sample_limit(store: Store, shards: Sequence[Shard], at_most: int) -> int | None:
    """The largest of the `at_most` smallest hashes of keys; None if there are no more keys than that."""
    task = ray.remote(smallest_hashes).options(num_cpus=1)
    waiting = [task.remote(store, [shard], at_most + 1) for shard in shards]
    parts = _answer(waiting)
    smallest = heapq.nsmallest(at_most + 1, itertools.chain(*parts))
    return smallest[-2] if len(smallest) > at_most else None


def load_collection(
    store: Store,
    shards: Sequence[Shard],
    side: int,
    limit: int | None = None,
    *,
    has_labels: bool = True,
    classes: Mapping[str, int] = MappingProxyType({}),
    size: Size = "native",
) -> Loading:
    """The Collection of some shards, decoded by one task each; waiting returns what is left out. Raises InputError."""
    load = ray.remote(load_labelled).options(num_cpus=1)
    options: dict[str, Any] = {"limit": limit, "has_labels": has_labels, "classes": classes, "size": size}
    parts = [load.remote(store, [shard], side=side, **options) for shard in shards]
    return Loading(*ray.remote(_joined).options(num_cpus=1, num_returns=2).remote(store.url, *parts))


def make_arm(
    name: str,
    store: Store,
    protected: Any,
    clean: Any,
    test: Any,
    *,
    test_shards: tuple[Store, list[Shard]],
    size: Size,
) -> Loading:
    """The Arm of a protected collection; waiting returns why it has no test images with deltas, "" if it has.

    Waiting raises InputError if the collection does not match the clean one.

    test_shards  store and shards of the test collection
    size         how the protected images were loaded
    """
    task = ray.remote(arm_of).options(num_cpus=1, num_returns=2)
    return Loading(*task.remote(name, store, protected, clean, test, test_shards, size))


def shared_rows(clean: Any, arms: Sequence[Any]) -> tuple[Any, str]:
    """A reference to bool [n], the clean images that every arm has, and a digest of them; "" if that is all."""
    task = ray.remote(_shared_rows).options(num_cpus=1, num_returns=2)
    rows, digest = task.remote(clean, *arms)
    return rows, str(_answer(digest))


@dataclass(frozen=True)
class LoadedLabels:
    """A labelling in the object store: a reference to Labels, their digest, and columns for the rows of each arm."""

    labels: Any
    digest: str
    facts: Mapping[str, Mapping[str, float]]


def label_collection(name: str, clean: Any, test: Any, arms: Mapping[str, Any], files: LabelFiles) -> LoadedLabels:
    """The labels that `name` gives the clean and the test images. Raises SettingsError or InputError."""
    task = ray.remote(_labelled).options(num_cpus=1, num_returns=2)
    labels, about = task.remote(name, files, clean, test, list(arms), *arms.values())
    digest, facts = _answer(about)
    return LoadedLabels(labels, digest, facts)


def check_collections(clean: Any, test: Any, settings: EvaluationSettings, side: int) -> None:
    """Raise InputError or SettingsError if a trial could not be run on these images.

    side  of what targets see, pixels
    """
    _answer(ray.remote(_check).options(num_cpus=1).remote(clean, test, settings, side))


def digest_of(holdout: float, *collections: Any) -> str:
    """Digest of everything that a trial on these collections sees."""
    task = ray.remote(Collection.digest).options(num_cpus=1)
    return sha256("\n".join([str(holdout), *ray.get([task.remote(collection) for collection in collections])]).encode())


def side_of(store: Store, shards: Sequence[Shard]) -> int:
    """Median shorter side in pixels of the first usable images. Raises InputError if there are none."""
    return int(_answer(ray.remote(median_side).options(num_cpus=1).remote(store, shards)))


def look_at(arm: Any, clean: Any) -> tuple[float, list[tuple[float, float]]]:
    """Epsilon of an arm, and (PSNR, SSIM) of some of its images against the clean ones."""
    found: tuple[float, list[tuple[float, float]]] = _answer(ray.remote(_look).options(num_cpus=1).remote(arm, clean))
    return found


def run_trials(
    trials: Sequence[Trial],
    data: EvaluationData,
    *,
    cpus: float,
    gpus: float,
    done: Callable[[Trial], None],
) -> None:
    """Run all of them as Tune trials, none stopped early. Raises ScumbleError if one fails for good."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the caller shows the progress
    resources = {"cpu": cpus} | ({"gpu": gpus} if gpus else {})
    by_key = {trial.key: trial for trial in trials}
    with tempfile.TemporaryDirectory(prefix="scumble-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trial_in_tune, data=data), resources),
            param_space={"trial": tune.grid_search([asdict(trial) for trial in trials])},
            tune_config=tune.TuneConfig(reuse_actors=True, metric="finished", mode="max"),
            run_config=tune.RunConfig(
                name="relearning",
                storage_path=scratch,
                verbose=0,
                callbacks=[_Told(lambda key: done(by_key[key]))],
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
            ),
        )
        results = tuner.fit()
    if results.errors:
        raise _first_failure(results.errors)


def trial_in_tune(config: dict[str, Any], data: EvaluationData) -> None:
    """The trainable of one trial."""
    trial = Trial(**config["trial"])
    if data.output.info(trial.result) is None:
        torch.set_num_threads(data.threads)
        arm = None if trial.protection in (CLEAN, CLEAN_PART) else ray.get(data.arms[trial.arm])
        row = run_trial(
            trial,
            ray.get(data.clean),
            ray.get(data.test),
            arm,
            ray.get(data.labels[trial.labelling]),
            holdout=data.holdout,
            everywhere=ray.get(data.everywhere) if trial.protection == CLEAN_PART else None,
            device=data.device,
            denoisers=_denoisers(data, trial),
            resume=_resume(data.output, trial),
            on_epoch=lambda training: _keep(data.output, trial, training),
        )
        about = {"key": trial.key, "computation": COMPUTATION, "side": data.side, "versions": data.versions}
        facts = data.facts.get((trial.arm, trial.labelling), {})
        data.output.create(trial.result, json.dumps(row | about | dict(facts)).encode())
        data.output.delete([trial.checkpoint])
    tune.report({"finished": 1, "key": trial.key})


def _denoisers(data: EvaluationData, trial: Trial) -> dict[str, Denoiser]:
    return {name: ray.get(data.denoisers[name]) for name in denoisers_of(trial.regime) if name in data.denoisers}


def _resume(output: Store, trial: Trial) -> dict[str, Any] | None:
    data = output.read_if_there(trial.checkpoint)
    if data is None:
        return None
    recorder().record(RESTARTED, 1, stage="relearn")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _keep(output: Store, trial: Trial, training: Training) -> None:
    file = io.BytesIO()
    torch.save(training.state(), file)
    output.put(trial.checkpoint, file.getvalue())


class _Told(tune.Callback):  # type: ignore[misc]
    """Reports every finished trial."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("finished") and "key" in result:
            self._tell(str(result["key"]))


def _check(clean: Collection, test: Collection, settings: EvaluationSettings, side: int) -> None:
    check_classes(clean, test)
    check_unlike(clean, test)
    held = holdout_mask(clean.keys, settings.holdout)
    for regime in settings.regimes:
        check_labels(regime, clean.labels[~held])
        check_regime(regime, has_holdout=bool(held.any()))
    check_shares(settings.shares, clean.keys, clean.labels)
    check_targets(settings.targets, settings.regimes, int(clean.labels.max()) + 1, side)


def _labelled(
    name: str,
    files: LabelFiles,
    clean: Collection,
    test: Collection,
    names: list[str],
    *arms: Arm,
) -> tuple[Labels, tuple[str, dict[str, dict[str, float]]]]:
    labels = label_both(name, clean, test, list(arms), files)
    facts = {arm_name: dict(labels.quality) for arm_name in (CLEAN, CLEAN_PART, *names)}
    for arm_name, arm in zip(names, arms, strict=True):
        if arm.clusters is not None:
            facts[arm_name] |= overlap_columns(arm, labels)
    return labels, (labels.digest(), facts)


def _look(arm: Arm, clean: Collection) -> tuple[float, list[tuple[float, float]]]:
    rows = np.linspace(0, len(arm.rows) - 1, min(LOOKED_AT, len(arm.rows))).astype(int)
    return arm.epsilon, scores_of(clean.images[arm.rows[rows]], arm.collection.images[rows])


def _joined(url: str, *parts: Collection) -> tuple[Collection, tuple[LeftOut, ...]]:
    whole = join(parts, url)
    return whole, whole.left_out


def _answer(references: Any) -> Any:
    return ray.get(references, timeout=LOAD_SECONDS)


def _shared_rows(clean: Collection, *arms: Arm) -> tuple[NDArray[np.bool_], str]:
    shared = np.ones(len(clean), bool)
    for arm in arms:
        shared &= np.isin(np.arange(len(clean)), arm.rows)
    return shared, "" if shared.all() else sha256(shared.tobytes())


def _first_failure(errors: Sequence[BaseException]) -> ScumbleError:
    if (ours := ours_in(errors[0])) is not None:
        return ours
    line = next((line for line in reversed(str(errors[0]).splitlines()) if line.strip()), type(errors[0]).__name__)
    return ClusterError(
        f"{len(errors)} trials failed, the first with: {line.strip()[:300]}; run the same command again"
    )
