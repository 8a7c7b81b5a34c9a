"""What a run is and what became of it: run.json, which decides who may resume in an output, and status.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pipeline import layout
from pipeline.errors import ConflictError, InputError
from pipeline.json_record import JsonRecord
from pipeline.records import Plan
from pipeline.runs.fingerprint import Ingredients
from pipeline.settings import Settings
from pipeline.storage.store import Store


@dataclass(frozen=True)
class RunRecord(JsonRecord):
    """run.json; contains no secrets: credentials and keys are not part of the settings."""

    fingerprint: str
    ingredients: Ingredients
    input: str
    num_shards: int
    input_bytes: int

    @classmethod
    def of(cls, ingredients: Ingredients, settings: Settings, plan: Plan) -> RunRecord:
        """The record of a planned run."""
        return cls(ingredients.fingerprint, ingredients, settings.input, len(plan.shards), plan.total_bytes)


def read_run(output: Store) -> RunRecord:
    """The run in an output. Raises InputError if none has started there."""
    record = RunRecord.read(output, layout.RUN)
    if record is None:
        raise InputError(f"{output.url} is not the output of a protection run: {layout.RUN} not found")
    return record


@dataclass(frozen=True)
class StageProgress(JsonRecord):
    """progress.json: how far the stage in progress is, for whoever looks from another terminal.

    unit         what is counted: shard, percent, object
    images       images of the shards that are done; 0 if the stage does not count them
    quarantined  samples of those that were rejected
    rate         images per second since the stage was started
    eta          seconds left at that rate; None while more units are being found, and `total` is what there is so far
    steps        step -> share of the workers' time, largest first
    updated      seconds since 1970
    """

    stage: str
    unit: str
    done: int
    total: int
    images: int
    quarantined: int
    rate: float
    eta: float | None
    steps: Mapping[str, float]
    updated: float


@dataclass(frozen=True)
class RunStatus(JsonRecord):
    """status.json: the machine-readable state of a run.

    state          running | done | failed
    stage          the last stage that was started
    stage_seconds  over all starts of this run
    counts         shards, protected and quarantined samples
    """

    fingerprint: str
    started: str
    updated: str = ""
    state: str = "running"
    stage: str = ""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    message: str | None = None
    exit_code: int | None = None


class Fingerprinted(Protocol):
    """The record of a run of any job, with what its fingerprint is made of: a dataclass."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def ingredients(self) -> Any: ...


def check_same_run(existing: Fingerprinted, wanted: Fingerprinted, output: str, *, overwrite: bool = True) -> None:
    """Raise ConflictError, naming the differences, if an output belongs to a run with another fingerprint.

    overwrite  whether the job has --overwrite
    """
    if existing.fingerprint == wanted.fingerprint:
        return
    differences = list(_differences("", asdict(existing.ingredients), asdict(wanted.ingredients)))
    shown = "; ".join(differences[:6]) or "format version"
    raise ConflictError(
        f"{output} belongs to another run ({shown}): use its settings to resume it, "
        + ("choose another --output, or add --overwrite" if overwrite else "or choose another --output")
    )


def _differences(prefix: str, old: Any, new: Any) -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _differences(f"{prefix}.{name}" if prefix else name, old.get(name), new.get(name))
    elif old != new:
        name = prefix.removeprefix("settings.")
        yield f"{name} was {_shortened(old)}, is {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
