"""User settings: units, ranges, conflicts, presets. Knows nothing of flag parsing or files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pipeline.errors import SettingsError
from pipeline.records import IMAGE_SUFFIXES

_T = TypeVar("_T")
Generator = Literal["distilled", "sample", "direct", "network", "texture"]
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
LARGEST_EPSILON = 127 / 255  # a delta is stored in 8 bits
NO_BOUND = 1.0  # epsilon of deltas that only the range of pixels limits; no run of our own may have it
# of the fit; for `distilled`, at most, unless --steps says otherwise: see for_images; for `sample`, per image
STEPS: dict[Generator, int] = {"distilled": 1500, "sample": 30, "direct": 100, "network": 100, "texture": 100}
FEWEST_CLUSTERS = 2  # each needs another to be moved to
MOST_CLUSTERS = 40  # unless more are asked for
NUM_BANDS = 40  # of textures, available under any key; more clusters than bands are refused
DISTILLED_BATCH, DISTILLED_PASSES, LEAST_DISTILLED_STEPS = 48, 12, 300
IMAGES_PER_CLUSTER: dict[Generator, int] = {
    "distilled": 600,
    "sample": 600,
    "direct": 400,
    "network": 400,
    "texture": 400,
}

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
        "epochs": 50,  # 10 for ImageNet*, says section 4.1
        "size": "224",
        "encode": "lossless",
        "fit_images": None,
    },
}
PRESETS["uc-clip-paper"] = PRESETS["uc-paper"] | {"surrogate": "open_clip:RN50/openai"}


def runtime(default: Any) -> Any:
    """A field that affects how a run proceeds but not its output bytes; excluded from the fingerprint."""
    return field(default=default, metadata={"decides_bytes": False})


class Deciding:
    """A settings dataclass in which some fields decide output bytes."""

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide output bytes, for the fingerprint."""
        columns = fields(self)  # type: ignore[arg-type]
        return {f.name: getattr(self, f.name) for f in columns if f.metadata.get("decides_bytes", True)}


@dataclass(frozen=True, kw_only=True)
class ApplySettings(Deciding):
    """Settings shared by protection runs and runs over uploads: how pictures are read and written, and by whom.

    Raises SettingsError, one line that names the option, for anything out of range.
    """

    size: Size = "native"
    small_images: SmallImages = "resize"  # how a universal generator sees pictures of at most 64 px
    encode: str = "same"  # same | lossless | jpeg:QUALITY
    metadata: Metadata = "keep"
    keep_sidecar: Sequence[str] = ()  # suffixes passed through unchecked, see pipeline.pictures.members
    max_pixels: int = 100_000_000
    max_member_bytes: int = 256 * 1024 * 1024
    max_quarantine: float = runtime(0.01)  # share of samples; exceeding it means exit code 3
    workers: int | None = runtime(None)  # processes per stage; None = based on the cluster's CPUs or GPUs
    gpus_per_worker: float = runtime(0.0)  # the fingerprint contains the device class, not the share

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
    """All settings of a protection run. The defaults are the preset `scumble`.

    Raises SettingsError, one line that names the option, for anything out of range or in conflict.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("uc", "one-for-all")

    # where
    input: str = runtime("")
    output: str = runtime("")
    # the surrogate and its clusters
    method: str = "uc"
    surrogate: str = DEFAULT_SURROGATE
    surrogate_weights: str | None = runtime(None)  # the fingerprint contains the weights' digest instead
    surrogate_size: int | None = None  # input side in pixels; None = see surrogates.surrogate.size_for
    clusters: int | None = None  # p; None = based on the number of images, see clusters_for
    cluster_space: ClusterSpace = "smoothed"
    restarts: int = 24
    cluster_images: int = 50_000  # k-means is fitted on a hash-sample of at most this many; the rest are assigned
    # the delta
    epsilon: float = DEFAULT_EPSILON
    generator: Generator = "distilled"
    optimise_through: OptimiseThrough = "proxy"
    plain: bool = False  # without colour-robust training of proxies and deltas
    permutation: Permutation = "next"
    train_images: TrainImages = "all"
    distance: Distance = "l2"
    bound: Bound = "project"
    delta_size: int | None = None  # side of deltas in pixels; None = see pipeline.fitting.objective.delta_side
    fit_images: int | None = 10_000  # number of images that deltas are fitted on; None = all
    steps: int = 0  # of the fit; for --generator sample, per image; 0 = STEPS of the generator, or as many as epochs
    epochs: int | None = None  # passes over the images to fit on, in place of steps
    proxies: int = 3  # for --generator distilled and sample
    proxy_steps: int = 400  # at least; fewer underfit: of 1,600 images, 150 steps teach 83 % their cluster, 600 97 %
    robust_proxies: int = 1  # of these, trained on adversarial examples, to counter adversarial training
    flat_share: float = 1.0  # of epsilon, where an image is flat; see pipeline.deltas.samplewise.local_bound
    batch_size: int = 256
    fit_threads: int = 2  # CPU threads of a fit; affects the last bits of float sums, hence output bytes
    step_size: float | None = None  # largest sign step for direct deltas, pixel units; None = 0.15 epsilon
    generator_lr: float | None = None  # Adam's, for generator networks; None = 1e-4
    key_file: str | None = runtime(None)  # secret for --generator texture; the fingerprint contains its digest
    seed: int = 0
    protection: str | None = runtime(None)  # apply this file instead of fitting; the fingerprint contains its digest
    # the run
    price_per_gpu_hour: float | None = runtime(None)
    price_per_cpu_hour: float | None = runtime(None)
    overwrite: bool = runtime(False)
    dry_run: bool = runtime(False)
    profile: bool = runtime(False)  # record where each worker's time goes; synchronises with the GPU after every step
    debug: bool = runtime(False)
    given: frozenset[str] = runtime(frozenset())  # names of options set by the user, whatever their values

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, self.METHODS)
        if "steps" in self.given:
            check("epochs" not in self.given, "--steps and --epochs contradict each other: omit one")
            object.__setattr__(self, "epochs", None)
        elif self.epochs is not None:
            object.__setattr__(self, "steps", 0)
        else:
            object.__setattr__(self, "steps", self.steps or STEPS[self.generator])
        check(self.steps >= 1 or self.epochs is not None, f"--steps must be at least 1; it is {self.steps}")
        limits = f"--epsilon must be above 0 and at most 127/255, e.g. 16/255; it is {self.epsilon:g}"
        check(0 < self.epsilon <= LARGEST_EPSILON, limits)
        object.__setattr__(self, "flat_share", float(self.flat_share))  # YAML's 1 is an int
        check(0 < self.flat_share <= 1, f"--flat-share is above 0 and at most 1, e.g. 0.4; it is {self.flat_share:g}")
        check(self.epsilon * 255 >= 1, "--epsilon below 1/255 cannot change an 8-bit image; use at least 1/255")
        check_least(self, _LEAST)
        self._check_clusters_and_key()
        self._check_conflicts()

    def for_images(self, images: int) -> Settings:
        """These settings with the steps that `epochs` means for so many images, the last batch of an epoch included.

        Without --steps, the network of `distilled` deltas takes fewer steps over small collections: 12 passes.
        """
        if self.generator == "distilled" and "steps" not in self.given:
            passes = DISTILLED_PASSES * images // DISTILLED_BATCH
            return replace(self, steps=min(self.steps, max(LEAST_DISTILLED_STEPS, passes)))
        if self.epochs is None:
            return self
        steps = self.epochs * -(-images // self.batch_size)
        return replace(self, steps=steps, epochs=None, given=self.given - {"epochs"})

    def _check_clusters_and_key(self) -> None:
        if self.generator == "texture":
            check(
                self.key_file is not None,
                "--generator texture needs --key-file FILE with at least 16 secret bytes "
                "(head -c 32 /dev/urandom > FILE)",
            )
            most = f"--generator texture has only {NUM_BANDS} distinct frequency bands: --clusters must be at most that"
            check(self.clusters is None or self.clusters <= NUM_BANDS, most)
        elif self.protection is None:
            check(self.key_file is None, "--key-file is the secret of --generator texture: omit it, or add that")
        few = f"--cluster-images {self.cluster_images} is less than the clusters that are fitted on them: use more"
        check(self.cluster_images >= (self.clusters or MOST_CLUSTERS), few)

    def _check_conflicts(self) -> None:
        if self.generator == "network":
            check(
                self.optimise_through == "surrogate",
                "--generator network is fitted through the surrogate: add --optimise-through surrogate",
            )
            check(
                self.bound != "project",
                "--generator network needs --bound tanh_clamp, eps_tanh or clamp_ste; "
                "project is for --generator direct",
            )
            side = self.delta_size
            check(side is None or side % 4 == 0, "--delta-size must be a multiple of 4 for --generator network")
        check(
            self.epochs is None or self.generator in ("direct", "network"),
            f"--epochs only applies to --generator direct and network, not {self.generator}",
        )
        if self.generator == "direct":
            check(self.bound == "project", "--generator direct is bounded by projection: use --bound project")
        if self.generator in ("distilled", "sample"):
            check(
                self.optimise_through == "proxy",
                f"--generator {self.generator} optimises through proxies: use --optimise-through proxy, or add "
                "--generator direct",
            )
            side = self.delta_size
            check(side is None or side % 2 == 0, f"--delta-size must be even for --generator {self.generator}")
            for name in sorted(self.given & {"distance", "bound", "batch_size"}):
                check(
                    False,
                    f"{flag(name)} has no effect with --generator {self.generator}: omit it, or add --generator direct",
                )
            check(
                self.robust_proxies <= self.proxies,
                f"--robust-proxies {self.robust_proxies} exceeds --proxies {self.proxies}",
            )
        else:
            for name in sorted(self.given & {"proxies", "robust_proxies", "flat_share"}):
                check(False, f"{flag(name)} only applies to --generator distilled and sample, not {self.generator}")
        if self.optimise_through == "surrogate":
            check("proxy_steps" not in self.given, "--proxy-steps has no effect with --optimise-through surrogate")
        if self.optimise_through == "proxy":
            check(
                self.train_images == "all",
                "--optimise-through proxy fits all deltas jointly: "
                "--train-images cluster needs --optimise-through surrogate",
            )
        for name, generator in (("step_size", "direct"), ("generator_lr", "network")):
            check(
                getattr(self, name) is None or self.generator == generator,
                f"{flag(name)} only applies to --generator {generator}, not {self.generator}",
            )


# what only a fit reads, so that it has no effect with --protection
OF_THE_FIT = frozenset(
    (
        *("clusters", "cluster_space", "restarts", "cluster_images", "generator", "optimise_through", "plain"),
        *("permutation", "train_images", "distance", "bound", "delta_size", "fit_images", "steps", "epochs"),
        *("proxies", "proxy_steps", "robust_proxies", "flat_share", "batch_size", "fit_threads", "step_size"),
        "generator_lr",
    )
)
_LEAST = {
    "surrogate_size": 32,
    "clusters": FEWEST_CLUSTERS,
    "restarts": 1,
    "cluster_images": 2,
    "delta_size": 8,
    "fit_images": 2,
    "epochs": 1,
    "proxies": 1,
    "robust_proxies": 0,
    "proxy_steps": 1,
    "batch_size": 1,
    "fit_threads": 1,
    "step_size": 0,
    "generator_lr": 0,
    "price_per_gpu_hour": 0,
    "price_per_cpu_hour": 0,
}


def settings_from(*layers: Mapping[str, Any], preset: str = "scumble") -> Settings:
    """Settings from a preset, overridden by layers of options; later layers win.

    Raises SettingsError, with near matches, for an unknown preset or option.
    """
    check_choice("preset", preset, tuple(PRESETS))
    given = {name: value for layer in layers for name, value in layer.items()}
    merged = PRESETS[preset] | given
    if merged.get("generator") == "network" and "bound" not in merged:
        merged["bound"] = "tanh_clamp"
    return settings_of_kind(Settings, merged | {"given": frozenset(given)})


def apply_settings(recorded: Mapping[str, Any]) -> ApplySettings:
    """How a run read and wrote pictures, from the settings in its record."""
    names = [each.name for each in fields(ApplySettings)]
    return ApplySettings(**{name: recorded[name] for name in names if name in recorded})


def settings_of_kind(kind: type[_T], options: Mapping[str, Any], required: tuple[str, ...] = ()) -> _T:
    """Settings of class `kind` from options.

    Raises SettingsError for unknown options, with near matches, for missing ones, and whatever `kind` raises.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise SettingsError(f"unknown option {name!r}{near_matches(name, known)}")
    for name in required:
        check(bool(options.get(name)), f"{flag(name)} is missing (see --help)")
    return kind(**options)


def near_matches(word: str, known: list[str]) -> str:
    """'; did you mean a, b?' or ''."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def jpeg_quality(encode: str) -> int | None:
    """Q from 'jpeg:Q'; None for 'same' and 'lossless'. Raises SettingsError."""
    if encode in ("same", "lossless"):
        return None
    match = re.fullmatch(r"jpeg:(\d{1,3})", encode)
    if match is None or not 1 <= int(match[1]) <= 100:
        raise SettingsError(f"--encode {encode!r} is not one of same, lossless, jpeg:1 … jpeg:100")
    return int(match[1])


def sidecars(suffixes: Sequence[str]) -> list[str]:
    """Suffixes of --keep-sidecar, lower-cased and sorted. Raises SettingsError for one that denotes an image."""
    cleaned = sorted({suffix.lower().lstrip(".") for suffix in suffixes})
    for suffix in cleaned:
        check(
            bool(suffix) and suffix not in IMAGE_SUFFIXES,
            f"--keep-sidecar {suffix!r} denotes the image itself: use a two-part suffix, such as seg.png",
        )
    return cleaned


def clusters_for(num_images: int, generator: Generator) -> int:
    """Number of clusters for a collection: IMAGES_PER_CLUSTER each, between 10 and 40 clusters, or one for each image.

    A delta seen on fewer images is not learnt before the real features: training on 4,000 images of CIFAR-10 reached
    51-57 % accuracy with 200 per cluster, 37-45 % with 400 (tests/fitting/test_effect.py). Sample-wise deltas work
    better with fewer clusters: 6,000 images gave 35 % with 10 clusters, 40 % with 15, 54 % with 40.
    """
    wanted = min(MOST_CLUSTERS, num_images // IMAGES_PER_CLUSTER[generator])
    return max(FEWEST_CLUSTERS, min(num_images, max(10, wanted)))


def flag(name: str) -> str:
    """The command-line option for a field."""
    return "--" + name.replace("_", "-")


def check(holds: bool, message: str) -> None:
    """Raise SettingsError with the message unless the condition holds."""
    if not holds:
        raise SettingsError(message)


def check_least(settings: object, least: Mapping[str, float]) -> None:
    """Raise SettingsError for a field below its minimum; None is always allowed."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        check(value is None or value >= lowest, f"{flag(name)} must be at least {lowest}; it is {value}")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise SettingsError, with near matches, for a value that is not allowed."""
    known = list(allowed)
    check(value in known, f"{flag(name)} {value!r} is not one of {', '.join(known)}{near_matches(str(value), known)}")
