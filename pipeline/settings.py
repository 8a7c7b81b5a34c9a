"""What a user may choose: units, ranges, conflicts, presets. Knows no flags and no files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from pipeline.errors import SettingsError

Method = Literal["uc", "one-for-all"]
Generator = Literal["direct", "network", "texture"]
OptimiseThrough = Literal["proxy", "surrogate"]
TrainImages = Literal["cluster", "all"]
Distance = Literal["kl", "cosine", "l2"]
Bound = Literal["project", "tanh_clamp", "eps_tanh", "clamp_ste"]
Permutation = Literal["next", "far"]
ClusterSpace = Literal["smoothed", "features"]
Size = Literal["native", "224"]
SmallImages = Literal["resize", "native"]
Metadata = Literal["keep", "strip-gps", "strip"]

EMBEDDED_SURROGATE = "timm:tf_efficientnet_lite0"
DEFAULT_SURROGATE = "open_clip:ViT-B-32/openai"
DEFAULT_EPSILON = 16 / 255

PRESETS: dict[str, dict[str, Any]] = {
    "scumble": {},
    "uc-paper": {
        "surrogate": "torchvision:resnet50/IMAGENET1K_V1",
        "clusters": 10,
        "cluster_space": "features",
        "restarts": 10,
        "generator": "network",
        "optimise_through": "surrogate",
        "distance": "kl",
        "bound": "tanh_clamp",
        "steps": 750,
        "size": "224",
        "encode": "lossless",
        "fit_images": None,
    },
}
PRESETS["uc-clip-paper"] = PRESETS["uc-paper"] | {"surrogate": "open_clip:RN50/openai"}


def _runtime(default: Any) -> Any:
    """A field that changes how a run goes, but not one output byte: left out of the fingerprint."""
    return field(default=default, metadata={"decides_bytes": False})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every choice of a protection run. The defaults are the preset `scumble`.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    # where
    input: str = _runtime("")
    output: str = _runtime("")
    # the surrogate and its clusters
    method: Method = "uc"
    surrogate: str = DEFAULT_SURROGATE
    surrogate_weights: str | None = _runtime(None)  # the digest of the weights is in the fingerprint instead
    surrogate_size: int | None = None  # side in pixels of what is embedded; None = as the weights were trained
    clusters: int | None = None  # p; None = from the number of images, see clusters_for
    cluster_space: ClusterSpace = "smoothed"
    restarts: int = 24
    cluster_images: int = 50_000  # k-means fits on a hash-sample of at most this many, the rest is assigned
    # the delta
    epsilon: float = DEFAULT_EPSILON
    generator: Generator = "direct"
    optimise_through: OptimiseThrough = "proxy"
    plain: bool = False  # without colour-robust training of proxy and delta
    permutation: Permutation = "next"
    train_images: TrainImages = "all"
    distance: Distance = "l2"
    bound: Bound = "project"
    delta_size: int | None = None  # side in pixels at which delta is made; None = pipeline.objective.delta_side
    fit_images: int | None = 10_000  # images that deltas are fitted on; None = all
    steps: int = 100
    batch_size: int = 256
    fit_threads: int = 2  # CPU threads of a fit; their number changes the last bits of float sums, so it decides bytes
    lr: float | None = None  # Adam for generators and delta through the surrogate; None = the generator's own
    key_file: str | None = _runtime(None)  # secret of --generator texture; its digest is in the fingerprint
    seed: int = 0
    protection: str | None = _runtime(None)  # apply this file instead of fitting; its digest is in the fingerprint
    # the files
    size: Size = "native"
    small_images: SmallImages = "resize"  # how a universal generator sees pictures of at most 64 px
    encode: str = "same"  # same | lossless | jpeg:QUALITY
    metadata: Metadata = "keep"
    max_pixels: int = 100_000_000
    max_member_bytes: int = 256 * 1024 * 1024
    # the run
    workers: int | None = _runtime(None)  # processes per stage; None = from the cluster's CPUs or GPUs
    gpus_per_worker: float = 0.0
    max_quarantine: float = _runtime(0.01)  # share of samples; more ends the run with exit code 3
    price_per_gpu_hour: float | None = _runtime(None)
    overwrite: bool = _runtime(False)
    dry_run: bool = _runtime(False)
    debug: bool = _runtime(False)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        _check(0 < self.epsilon < 1, f"--epsilon must lie between 0 and 1, e.g. 16/255; it is {self.epsilon:g}")
        _check(self.epsilon * 255 >= 1, "--epsilon below 1/255 cannot change an 8-bit image; use 1/255 or more")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            _check(value is None or value >= least, f"{_flag(name)} must be at least {least}; it is {value}")
        _check(0 <= self.max_quarantine <= 1, "--max-quarantine is a share between 0 and 1, e.g. 0.01")
        jpeg_quality(self.encode)
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        if self.generator == "texture":
            _check(
                self.key_file is not None,
                "--generator texture needs --key-file FILE with at least 16 secret bytes "
                "(head -c 32 /dev/urandom > FILE)",
            )
        if self.generator == "network":
            _check(
                self.optimise_through == "surrogate",
                "--generator network is fitted per cluster through the surrogate: add --optimise-through surrogate",
            )
            _check(
                self.bound != "project",
                "--generator network needs --bound tanh_clamp, eps_tanh or clamp_ste; "
                "project is for --generator direct",
            )
            side = self.delta_size
            _check(side is None or side % 4 == 0, "--delta-size must be a multiple of 4 for --generator network")
        if self.generator == "direct":
            _check(self.bound == "project", "--generator direct is bounded by projection: leave --bound at project")
        if self.optimise_through == "proxy":
            _check(
                self.train_images == "all",
                "--optimise-through proxy fits all deltas together: "
                "--train-images cluster needs --optimise-through surrogate",
            )

    @property
    def deciding(self) -> dict[str, Any]:
        """The choices that decide output bytes, for the fingerprint."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("decides_bytes", True)}


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "cluster_space": get_args(ClusterSpace),
    "generator": get_args(Generator),
    "optimise_through": get_args(OptimiseThrough),
    "permutation": get_args(Permutation),
    "train_images": get_args(TrainImages),
    "distance": get_args(Distance),
    "bound": get_args(Bound),
    "size": get_args(Size),
    "small_images": get_args(SmallImages),
    "metadata": get_args(Metadata),
}
_LEAST = {
    "surrogate_size": 32,
    "clusters": 2,
    "restarts": 1,
    "cluster_images": 2,
    "delta_size": 8,
    "fit_images": 2,
    "steps": 1,
    "batch_size": 1,
    "fit_threads": 1,
    "lr": 0,
    "max_pixels": 1,
    "max_member_bytes": 1,
    "workers": 1,
    "gpus_per_worker": 0,
    "price_per_gpu_hour": 0,
}


def settings_from(*layers: Mapping[str, Any], preset: str = "scumble") -> Settings:
    """Settings from a preset, overlaid with layers of options; later layers win.

    Raises SettingsError for an unknown preset or option, with near matches.
    """
    _check_choice("preset", preset, tuple(PRESETS))
    merged = dict(PRESETS[preset])
    known = [f.name for f in fields(Settings)]
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise SettingsError(f"unknown option {name!r}{near_matches(name, known)}")
            merged[name] = value
    if merged.get("generator", "direct") == "network" and "bound" not in merged:
        merged["bound"] = "tanh_clamp"
    return Settings(**merged)


def near_matches(word: str, known: list[str]) -> str:
    """'; did you mean a, b?' or nothing."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def parse_epsilon(text: str | float) -> float:
    """'16/255' or '0.0627' -> float. Raises SettingsError."""
    number, slash, divisor = str(text).partition("/")
    try:
        return float(number) / (float(divisor) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"--epsilon {text!r} is not a number or a fraction like 16/255") from None


def jpeg_quality(encode: str) -> int | None:
    """The Q of 'jpeg:Q'; None for 'same' and 'lossless'. Raises SettingsError."""
    if encode in ("same", "lossless"):
        return None
    match = re.fullmatch(r"jpeg:(\d{1,3})", encode)
    if match is None or not 1 <= int(match[1]) <= 100:
        raise SettingsError(f"--encode {encode!r} is none of same, lossless, jpeg:1 … jpeg:100")
    return int(match[1])


def clusters_for(num_images: int) -> int:
    """Number of clusters for a collection: about 400 images each, between 10 and 40.

    A delta that is seen on fewer images is not learnt before the real features: with 200 each, 4,000 images of
    CIFAR-10 kept 51-57 % accuracy; with 400 each, 37-45 % (tests/test_effect.py).
    """
    return max(10, min(40, num_images // 400))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(
        value in allowed,
        f"{_flag(name)} {value!r} is none of {', '.join(allowed)}{near_matches(str(value), list(allowed))}",
    )
