"""User settings for new uploads: units, ranges, conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.settings import ApplySettings, check, check_least, settings_of_kind


@dataclass(frozen=True, kw_only=True)
class UploadSettings(ApplySettings):
    """All settings of a run over new uploads.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    input: str
    output: str
    protection: str
    surrogate_weights: str | None = None
    key_file: str | None = None
    settle: float = 30.0  # seconds since the last change after which an upload counts as complete
    unit_images: int = 50
    unit_bytes: int = 64 * 1024 * 1024
    max_drift: float = 0.1  # share of a run's images beyond the fitted p99; exceeding it means a warning
    watch: float | None = None  # seconds between passes
    lease: float = 60.0  # seconds that a lease lasts without a heartbeat
    wait_lease: float = 0.0
    ray: bool = False
    metrics_port: int | None = None
    metrics_linger: float | None = None
    metrics_file: str | None = None
    dry_run: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"settle": 0, "unit_images": 1, "unit_bytes": 1, "watch": 0.1, "lease": 1, "wait_lease": 0}
        least |= {"metrics_port": 1, "metrics_linger": 0}
        check_least(self, least)
        check(0 <= self.max_drift <= 1, "--max-drift is a share between 0 and 1, e.g. 0.1")
        looks_once = self.watch is None
        check(looks_once or not self.dry_run, "--dry-run makes a single pass: omit --watch")
        check(
            looks_once or self.metrics_file is None,
            "--metrics-file is written when a run ends, but --watch runs for ever: use --metrics-port",
        )
        check(
            self.metrics_linger is None or self.metrics_port is not None,
            "--metrics-linger keeps the metrics port open: add --metrics-port PORT",
        )
        check(self.workers is None or self.ray, "--workers sets the number of Ray processes: add --ray")
        check(self.size == "native", "--size is for protect_imagenet.py; uploads keep their size")

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide output bytes; limits only decide what is refused."""
        return {name: getattr(self, name) for name in ("encode", "metadata", "small_images", "keep_sidecar")}


def uploads_from(given: Mapping[str, Any]) -> UploadSettings:
    """Settings from options. Raises SettingsError for missing or unknown ones, with near matches."""
    return settings_of_kind(UploadSettings, given, required=("input", "output", "protection"))
