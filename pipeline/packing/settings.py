"""What a user may choose for packing and unpacking: units, ranges, conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.settings import Deciding, check, check_choice, check_least, runtime, settings_of_kind

Format = Literal["auto", "folder", "tar", "cifar", "npz", "parquet"]
UnpackFormat = Literal["folder", "parquet"]


@dataclass(frozen=True, kw_only=True)
class PackSettings(Deciding):
    """All settings of packing. What files beside the input say is part of the listing, which decides as well.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    input: str = runtime("")
    output: str = runtime("")
    format: Format = "auto"
    split: str | None = None
    labels: str | None = runtime(None)
    ground_truth: str | None = runtime(None)
    synsets: str | None = runtime(None)
    classes: str | None = runtime(None)
    first_classes: int | None = None
    images: int | None = None
    shuffle: int | None = None  # seed; None: in the order of the input
    shard_images: int = 1000
    shard_bytes: int = 512 * 1024 * 1024
    max_member_bytes: int = 256 * 1024 * 1024
    ray: bool = runtime(False)
    workers: int | None = runtime(None)
    dry_run: bool = runtime(False)
    debug: bool = runtime(False)

    gpus_per_worker = 0.0  # what a Ray worker asks for

    def __post_init__(self) -> None:
        check_choice("format", self.format, get_args(Format))
        least = {"first_classes": 1, "images": 1, "shuffle": 0, "shard_images": 1, "shard_bytes": 1, "workers": 1}
        check_least(self, least | {"max_member_bytes": 1})
        check(self.classes is None or self.first_classes is None, "--classes and --first-classes: choose one")
        check(self.synsets is None or self.ground_truth is not None, "--synsets explains --ground-truth: add that")
        check(self.labels is None or self.ground_truth is None, "--labels and --ground-truth: choose one")
        check(self.workers is None or self.ray, "--workers sets the number of Ray processes: add --ray")


@dataclass(frozen=True, kw_only=True)
class UnpackSettings(Deciding):
    """All settings of unpacking."""

    input: str = runtime("")
    output: str = runtime("")
    format: UnpackFormat = "folder"
    max_member_bytes: int = 256 * 1024 * 1024
    ray: bool = runtime(False)
    workers: int | None = runtime(None)
    dry_run: bool = runtime(False)
    debug: bool = runtime(False)

    gpus_per_worker = 0.0

    def __post_init__(self) -> None:
        check_choice("format", self.format, get_args(UnpackFormat))
        check_least(self, {"workers": 1, "max_member_bytes": 1})
        check(self.workers is None or self.ray, "--workers sets the number of Ray processes: add --ray")


def pack_settings(given: Mapping[str, Any]) -> PackSettings:
    """Settings from options. Raises SettingsError for missing or unknown ones, with near matches."""
    return settings_of_kind(PackSettings, given, required=("input", "output"))


def unpack_settings(given: Mapping[str, Any]) -> UnpackSettings:
    """Settings from options. Raises SettingsError for missing or unknown ones, with near matches."""
    return settings_of_kind(UnpackSettings, given, required=("input", "output"))
