"""What a user may choose for new uploads: units, ranges, conflicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.settings import Metadata, Settings, SmallImages, check, check_least, settings_of_kind


@dataclass(frozen=True, kw_only=True)
class UploadSettings:
    """Every choice of a run over new uploads.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    input: str
    output: str
    protection: str
    surrogate_weights: str | None = None
    key_file: str | None = None
    settle: float = 30.0  # seconds since the last change after which an upload is taken for complete
    unit_images: int = 50
    unit_bytes: int = 64 * 1024 * 1024
    encode: str = "same"
    metadata: Metadata = "keep"
    small_images: SmallImages = "resize"
    keep_sidecar: Sequence[str] = ()  # in shards
    max_pixels: int = 100_000_000
    max_member_bytes: int = 256 * 1024 * 1024
    max_quarantine: float = 0.01  # share of a run's images; more ends it with exit code 3
    max_drift: float = 0.1  # share of a run's images beyond the training's p99; more is a warning
    watch: float | None = None  # seconds between two looks
    lease: float = 60.0  # seconds that a lease holds without a heartbeat
    wait_lease: float = 0.0
    ray: bool = False
    workers: int | None = None
    gpus_per_worker: float = 0.0
    metrics_port: int | None = None
    metrics_linger: float | None = None
    metrics_file: str | None = None
    dry_run: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        least = {"settle": 0, "unit_images": 1, "unit_bytes": 1, "watch": 0.1, "lease": 1, "wait_lease": 0}
        least |= {"metrics_port": 1, "metrics_linger": 0}
        check_least(self, least)
        check(0 <= self.max_drift <= 1, "--max-drift is a share between 0 and 1, e.g. 0.1")
        looks_once = self.watch is None
        check(looks_once or not self.dry_run, "--dry-run looks once: leave --watch out")
        check(
            looks_once or self.metrics_file is None,
            "--metrics-file is written at the end, which --watch has not: use --metrics-port",
        )
        check(
            self.metrics_linger is None or self.metrics_port is not None,
            "--metrics-linger keeps the port of --metrics-port open: add --metrics-port PORT",
        )
        check(self.workers is None or self.ray, "--workers is the number of Ray's processes: add --ray")
        _ = self.pictures

    @property
    def pictures(self) -> Settings:
        """How each picture is decoded and written."""
        return Settings(
            encode=self.encode,
            metadata=self.metadata,
            small_images=self.small_images,
            keep_sidecar=self.keep_sidecar,
            max_pixels=self.max_pixels,
            max_member_bytes=self.max_member_bytes,
            max_quarantine=self.max_quarantine,
            workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
        )

    @property
    def deciding(self) -> dict[str, Any]:
        """The choices that decide an output's bytes; limits only decide what is refused."""
        chosen = {name: getattr(self, name) for name in ("encode", "metadata", "small_images")}
        return chosen | {"keep_sidecar": self.pictures.keep_sidecar}


def uploads_from(given: Mapping[str, Any]) -> UploadSettings:
    """Settings from options. Raises SettingsError for one that is missing or unknown, with near matches."""
    return settings_of_kind(UploadSettings, given, required=("input", "output", "protection"))
