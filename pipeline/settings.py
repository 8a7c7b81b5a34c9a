"""What a user may choose: units, ranges, conflicts, presets. Knows no flags and no files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pipeline.errors import SettingsError
from pipeline.records import IMAGE_SUFFIXES

_T = TypeVar("_T")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
Method = Literal["uc", "one-for-all"]
Generator = Literal["sample", "direct", "network", "texture"]
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
# of the fit; with `sample`, of every image
STEPS: dict[Generator, int] = {"sample": 30, "direct": 100, "network": 100, "texture": 100}
IMAGES_PER_CLUSTER: dict[Generator, int] = {"sample": 600, "direct": 400, "network": 400, "texture": 400}

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


def runtime(default: Any) -> Any:
    """A field that changes how a run goes, but not one output byte: left out of the fingerprint."""
    return field(default=default, metadata={"decides_bytes": False})


class Deciding:
    """Settings, a dataclass, of which some fields decide output bytes."""

    @property
    def deciding(self) -> dict[str, Any]:
        """The choices that decide output bytes, for the fingerprint."""
        found = fields(self)  # type: ignore[arg-type]
        return {f.name: getattr(self, f.name) for f in found if f.metadata.get("decides_bytes", True)}


@dataclass(frozen=True, kw_only=True)
class ApplySettings(Deciding):
    """What a protection run and a run over uploads choose alike: how pictures are read and written, and by whom.

    Raises SettingsError, one line that names the option, for anything out of range.
    """

    size: Size = "native"
    small_images: SmallImages = "resize"  # how a universal generator sees pictures of at most 64 px
    encode: str = "same"  # same | lossless | jpeg:QUALITY
    metadata: Metadata = "keep"
    keep_sidecar: Sequence[str] = ()  # suffixes that leave without a look, see pipeline.pictures.members
    max_pixels: int = 100_000_000
    max_member_bytes: int = 256 * 1024 * 1024
    max_quarantine: float = runtime(0.01)  # share of samples; more ends the run with exit code 3
    workers: int | None = runtime(None)  # processes per stage; None = from the cluster's CPUs or GPUs
    gpus_per_worker: float = runtime(0.0)  # the class of device is in the fingerprint, its share is not

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))
        check_least(self, {"max_pixels": 1, "max_member_bytes": 1, "workers": 1, "gpus_per_worker": 0})
        check(0 <= self.max_quarantine <= 1, "--max-quarantine is a share between 0 and 1, e.g. 0.01")
        jpeg_quality(self.encode)
        object.__setattr__(self, "keep_sidecar", sidecars(self.keep_sidecar))


@dataclass(frozen=True, kw_only=True)
class Settings(ApplySettings):
    """Every choice of a protection run. The defaults are the preset `scumble`.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    # where
    input: str = runtime("")
    output: str = runtime("")
    # the surrogate and its clusters
    method: Method = "uc"
    surrogate: str = DEFAULT_SURROGATE
    surrogate_weights: str | None = runtime(None)  # the digest of the weights is in the fingerprint instead
    surrogate_size: int | None = None  # side in pixels of what is embedded; None = as the weights were trained
    clusters: int | None = None  # p; None = from the number of images, see clusters_for
    cluster_space: ClusterSpace = "smoothed"
    restarts: int = 24
    cluster_images: int = 50_000  # k-means fits on a hash-sample of at most this many, the rest is assigned
    # the delta
    epsilon: float = DEFAULT_EPSILON
    generator: Generator = "sample"
    optimise_through: OptimiseThrough = "proxy"
    plain: bool = False  # without colour-robust training of proxy and delta
    permutation: Permutation = "next"
    train_images: TrainImages = "all"
    distance: Distance = "l2"
    bound: Bound = "project"
    delta_size: int | None = None  # side in pixels at which delta is made; None = pipeline.fitting.objective.delta_side
    fit_images: int | None = 10_000  # images that deltas are fitted on; None = all
    steps: int = 0  # of the fit; with --generator sample, of every image; 0 = STEPS of the generator
    proxies: int = 3  # of --generator sample
    robust_proxies: int = 1  # of them, trained on adversarial examples: against those who train so themselves
    batch_size: int = 256
    fit_threads: int = 2  # CPU threads of a fit; their number changes the last bits of float sums, so it decides bytes
    step_size: float | None = None  # largest sign step of a direct delta, pixel units; None = 0.15 epsilon
    generator_lr: float | None = None  # of Adam, for generator networks; None = 1e-4
    key_file: str | None = runtime(None)  # secret of --generator texture; its digest is in the fingerprint
    seed: int = 0
    protection: str | None = runtime(None)  # apply this file instead of fitting; its digest is in the fingerprint
    # the run
    price_per_gpu_hour: float | None = runtime(None)
    price_per_cpu_hour: float | None = runtime(None)
    overwrite: bool = runtime(False)
    dry_run: bool = runtime(False)
    profile: bool = runtime(False)  # where each worker's time goes; the GPU is waited for after every step
    debug: bool = runtime(False)
    given: frozenset[str] = runtime(frozenset())  # names of the options that the user has set, whatever their values

    def __post_init__(self) -> None:
        super().__post_init__()
        if "steps" not in self.given:
            object.__setattr__(self, "steps", self.steps or STEPS[self.generator])
        check(0 < self.epsilon < 1, f"--epsilon must lie between 0 and 1, e.g. 16/255; it is {self.epsilon:g}")
        check(self.epsilon * 255 >= 1, "--epsilon below 1/255 cannot change an 8-bit image; use 1/255 or more")
        check_least(self, _LEAST)
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        if self.generator == "texture":
            check(
                self.key_file is not None,
                "--generator texture needs --key-file FILE with at least 16 secret bytes "
                "(head -c 32 /dev/urandom > FILE)",
            )
        if self.generator == "network":
            check(
                self.optimise_through == "surrogate",
                "--generator network is fitted per cluster through the surrogate: add --optimise-through surrogate",
            )
            check(
                self.bound != "project",
                "--generator network needs --bound tanh_clamp, eps_tanh or clamp_ste; "
                "project is for --generator direct",
            )
            side = self.delta_size
            check(side is None or side % 4 == 0, "--delta-size must be a multiple of 4 for --generator network")
        if self.generator == "direct":
            check(self.bound == "project", "--generator direct is bounded by projection: leave --bound at project")
        if self.generator == "sample":
            check(
                self.optimise_through == "proxy",
                "--generator sample takes its steps through proxies: leave --optimise-through at proxy, "
                "or add --generator direct",
            )
            side = self.delta_size
            check(side is None or side % 2 == 0, "--delta-size must be even for --generator sample")
            for name in sorted(self.given & {"distance", "bound", "batch_size"}):
                check(False, f"{flag(name)} does nothing for --generator sample: omit it, or add --generator direct")
            check(
                self.robust_proxies <= self.proxies,
                f"--robust-proxies {self.robust_proxies} of --proxies {self.proxies}: more than there are",
            )
        else:
            for name in sorted(self.given & {"proxies", "robust_proxies"}):
                check(False, f"{flag(name)} belongs to --generator sample, not {self.generator}")
        if self.optimise_through == "proxy":
            check(
                self.train_images == "all",
                "--optimise-through proxy fits all deltas together: "
                "--train-images cluster needs --optimise-through surrogate",
            )
        for name, generator in (("step_size", "direct"), ("generator_lr", "network")):
            check(
                getattr(self, name) is None or self.generator == generator,
                f"{flag(name)} belongs to --generator {generator}; it does nothing for {self.generator}",
            )


_LEAST = {
    "surrogate_size": 32,
    "clusters": 2,
    "restarts": 1,
    "cluster_images": 2,
    "delta_size": 8,
    "fit_images": 2,
    "steps": 1,
    "proxies": 1,
    "robust_proxies": 0,
    "batch_size": 1,
    "fit_threads": 1,
    "step_size": 0,
    "generator_lr": 0,
    "price_per_gpu_hour": 0,
    "price_per_cpu_hour": 0,
}


def settings_from(*layers: Mapping[str, Any], preset: str = "scumble") -> Settings:
    """Settings from a preset, overlaid with layers of options; later layers win.

    Raises SettingsError for an unknown preset or option, with near matches.
    """
    check_choice("preset", preset, tuple(PRESETS))
    given = {name: value for layer in layers for name, value in layer.items()}
    merged = PRESETS[preset] | given
    if merged.get("generator") == "network" and "bound" not in merged:
        merged["bound"] = "tanh_clamp"
    return settings_of_kind(Settings, merged | {"given": frozenset(given)})


def settings_of_kind(kind: type[_T], options: Mapping[str, Any], required: tuple[str, ...] = ()) -> _T:
    """Settings of one kind from options.

    Raises SettingsError for an option that is unknown, with near matches, or missing, and what `kind` raises.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise SettingsError(f"unknown option {name!r}{near_matches(name, known)}")
    for name in required:
        check(bool(options.get(name)), f"{flag(name)} is missing (see --help)")
    return kind(**options)


def near_matches(word: str, known: list[str]) -> str:
    """'; did you mean a, b?' or nothing."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def parse_epsilon(text: str | float) -> float:
    """'16/255' or '0.0627', in pixel units -> float. Raises SettingsError."""
    number, slash, divisor = str(text).partition("/")
    try:
        return float(number) / (float(divisor) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise SettingsError(f"--epsilon {text!r} is not a number or a fraction like 16/255") from None


def parse_seconds(text: str) -> float:
    """'30s', '2m', '1h' or a bare number of seconds. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smhd]?)\s*", text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _SECONDS[found[2]]


def parse_bytes(text: str) -> int:
    """'64M', '1G', '500k' or a bare number of bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]+)\s*([kMG]?)i?B?\s*", text)
    if found is None:
        raise ValueError(text)
    return int(found[1]) << {"": 0, "k": 10, "M": 20, "G": 30}[found[2]]


def jpeg_quality(encode: str) -> int | None:
    """The Q of 'jpeg:Q'; None for 'same' and 'lossless'. Raises SettingsError."""
    if encode in ("same", "lossless"):
        return None
    match = re.fullmatch(r"jpeg:(\d{1,3})", encode)
    if match is None or not 1 <= int(match[1]) <= 100:
        raise SettingsError(f"--encode {encode!r} is none of same, lossless, jpeg:1 … jpeg:100")
    return int(match[1])


def sidecars(suffixes: Sequence[str]) -> list[str]:
    """Suffixes of --keep-sidecar in small letters, sorted. Raises SettingsError for one that names the image itself."""
    found = sorted({suffix.lower().lstrip(".") for suffix in suffixes})
    for suffix in found:
        check(
            bool(suffix) and suffix not in IMAGE_SUFFIXES,
            f"--keep-sidecar {suffix!r} is no sidecar but the image: use a suffix of two parts, such as seg.png",
        )
    return found


def clusters_for(num_images: int, generator: Generator) -> int:
    """Number of clusters for a collection: IMAGES_PER_CLUSTER each, between 10 and 40.

    A delta that is seen on fewer images is not learnt before the real features: with 200 each, 4,000 images of
    CIFAR-10 kept 51-57 % accuracy; with 400 each, 37-45 % (tests/fitting/test_effect.py). Deltas of single images do
    better with fewer clusters: 6,000 images kept 35 % with 10 clusters, 40 % with 15, 54 % with 40.
    """
    return max(10, min(40, num_images // IMAGES_PER_CLUSTER[generator]))


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def check(holds: bool, message: str) -> None:
    """Raise SettingsError unless it holds."""
    if not holds:
        raise SettingsError(message)


def check_least(settings: object, least: Mapping[str, float]) -> None:
    """Raise SettingsError for a field below its least value; None is always allowed."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        check(value is None or value >= lowest, f"{flag(name)} must be at least {lowest}; it is {value}")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise SettingsError, with near matches, for a value that is none of the allowed."""
    known = list(allowed)
    check(value in known, f"{flag(name)} {value!r} is none of {', '.join(known)}{near_matches(str(value), known)}")
