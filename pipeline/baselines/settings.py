"""What a user may choose for a run of a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipeline.baselines.methods import BASELINES, baseline
from pipeline.settings import (
    DEFAULT_EPSILON,
    EMBEDDED_SURROGATE,
    NO_BOUND,
    Generator,
    Settings,
    check,
    check_choice,
    check_least,
    flag,
    runtime,
    settings_of_kind,
)

GIVEN = "deltas"  # the method of a run with --deltas FILE
Grouping = Literal["true", "predicted", "cluster", "none"]
EMBEDDED = ("predicted", "cluster")  # groupings by features
# fields of Settings that such a run does not use
_OTHERS = frozenset(
    ("generator", "optimise_through", "plain", "permutation", "train_images", "distance", "bound", "steps", "epochs")
    + ("proxies", "robust_proxies", "flat_share", "batch_size", "step_size", "generator_lr")
)
_SURROGATE = ("surrogate", "surrogate_weights", "surrogate_size")
_CLUSTERED = ("clusters", "cluster_images", "cluster_space", "restarts")


@dataclass(frozen=True, kw_only=True)
class BaselineRunSettings(Settings):
    """All settings of a baseline's run.

    method         one of BASELINES, or GIVEN
    labels         what stands for labels: those of the samples, the surrogate's guess, or clusters; none: nothing
    effort         share of the published steps
    network        that the method trains; None: the published one
    deltas         file or folder of precomputed deltas, in place of a method
    deltas_sha256  its digest
    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    METHODS: ClassVar[tuple[str, ...]] = (*BASELINES, GIVEN)

    method: str = ""
    surrogate: str = EMBEDDED_SURROGATE
    generator: Generator = "direct"
    labels: Grouping = "true"
    effort: float = 1.0
    network: str | None = None
    deltas: str | None = runtime(None)
    deltas_sha256: str | None = None

    def __post_init__(self) -> None:
        from pipeline.deltas.delta import levels_of  # imported late: --help needs no torch

        check_choice("method", self.method, self.METHODS)
        own = f"--method {self.method} has a budget of its own: omit --epsilon"
        check(self.is_bounded or "epsilon" not in self.given, own)
        epsilon = self.epsilon if self.is_bounded else NO_BOUND
        if epsilon == NO_BOUND and (self.method == GIVEN or not self.is_bounded):
            object.__setattr__(self, "epsilon", DEFAULT_EPSILON)  # in place of what protections of our own may not have
        super().__post_init__()
        object.__setattr__(self, "epsilon", epsilon)
        levels_of(epsilon)
        check(0 < self.effort <= 1, f"--effort is a share above 0, at most 1; it is {self.effort:g}")
        check_least(self, {"delta_size": 8})
        self._check_unused()
        if self.network is not None:
            check(BASELINES[self.method].trains, f"--method {self.method} trains no network to choose: omit --network")
            baseline(self.method, self.network)

    @property
    def is_bounded(self) -> bool:
        """True if epsilon, rather than a budget of the method's own, limits the deltas."""
        return self.method == GIVEN or baseline(self.method).bound == "linf"

    @property
    def per_sample(self) -> bool:
        """True if every picture gets a delta of its own."""
        return self.method == GIVEN or baseline(self.method).per_sample

    @property
    def deciding(self) -> dict[str, Any]:
        """As Deciding.deciding, without what only other methods use."""
        return {name: value for name, value in super().deciding.items() if name not in _OTHERS}

    def _check_unused(self) -> None:
        if self.method == GIVEN:
            for name in sorted(self.given & {"labels", "effort", "network", "fit_images", "delta_size"}):
                check(False, f"{flag(name)} has no effect with --deltas: omit it")
        elif self.per_sample:
            check("fit_images" not in self.given, f"--method {self.method} fits every image: omit --fit-images")
        for names, users in ((_CLUSTERED, ("cluster",)), (_SURROGATE, EMBEDDED)):
            for name in sorted(self.given & set(names)):
                only = f"{flag(name)} only applies to --labels {' or '.join(users)}, not {self.labels}"
                check(self.labels in users, only)


def baseline_settings(given: Mapping[str, Any]) -> BaselineRunSettings:
    """Settings from the options that were given. Raises SettingsError."""
    check(
        ("method" in given) != ("deltas" in given),
        "choose a published protection with --method NAME, or give precomputed ones with --deltas FILE",
    )
    chosen = dict(given) | ({"method": GIVEN, "labels": "none"} if "deltas" in given else {})
    return settings_of_kind(BaselineRunSettings, chosen | {"given": frozenset(given)})
