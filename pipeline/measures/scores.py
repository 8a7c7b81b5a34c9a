"""What a delta does to a picture, and how much of it survives ordinary handling, computed from uint8 arrays."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import unreadable

Picture = NDArray[np.uint8]  # [H, W, 3] or [H, W]
FIGURES = ("max_abs_delta", "rms", "psnr", "ssim", "survives_jpeg75", "survives_half_size")
PERCENTILES = (1, 5, 50, 95, 99)
_GREY = np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
_SSIM_WINDOW = 7
_MIDDLE = 2048  # pixels a side


@dataclass(frozen=True)
class PictureScore:
    """Scores of a protected picture x' against its original x; delta = x' - x in 8-bit levels, all pixels and channels.

    max_abs_delta       max |delta|
    rms                 sqrt(mean delta^2)
    psnr                20 log10(255 / rms) in dB; infinite if nothing changed
    ssim                structural similarity of luminance, 7 x 7 uniform window (Wang et al. 2004); nan below 7 pixels
    survives_jpeg75     <J(x') - J(x), delta> / <delta, delta>, J = JPEG at quality 75 with 4:2:0, decoded: the
                        share of the delta left along its own direction; 1 = all, 0 = none
    survives_half_size  the same with J = reduced to half width and height (bilinear with antialiasing, rounded to 8
                        bits) and enlarged again; fine grain is lost, coarse parts stay
    Both shares are nan if nothing changed. Beyond 2048 pixels a side, all scores but max_abs_delta are computed
    on the central part, because they take 90 bytes of memory per pixel.
    """

    key: str
    cluster: int
    max_abs_delta: int
    rms: float
    psnr: float
    ssim: float
    survives_jpeg75: float
    survives_half_size: float


@dataclass(frozen=True)
class Spread:
    """One figure over many pictures. Pictures without the figure (nan) are excluded; `count` is how many remain."""

    count: int
    mean: float
    least: float
    most: float
    percentiles: dict[int, float]


def score_picture(key: str, cluster: int, original: Picture, protected: Picture) -> PictureScore:
    """Score one picture. Both arrays must be uint8 [H, W, 3] or [H, W] of equal shape, else raises ValueError."""
    if original.shape != protected.shape or original.dtype != np.uint8 or protected.dtype != np.uint8:
        raise ValueError(
            f"{key}: original {original.dtype} {original.shape}, protected {protected.dtype} {protected.shape};"
            " both must be uint8 and of equal shape"
        )
    largest = int((np.maximum(protected, original) - np.minimum(protected, original)).max())
    original, protected = _middle(original), _middle(protected)
    delta = protected.astype(np.float64) - original
    rms = math.sqrt(float(np.mean(delta**2)))
    return PictureScore(
        key=key,
        cluster=cluster,
        max_abs_delta=largest,
        rms=rms,
        psnr=psnr_of(rms),
        ssim=_ssim(original, protected),
        survives_jpeg75=_surviving_share(delta, _through_jpeg(protected) - _through_jpeg(original)),
        survives_half_size=_surviving_share(delta, _through_half_size(protected) - _through_half_size(original)),
    )


def psnr_of(rms: float) -> float:
    """Peak signal-to-noise ratio in dB of an error with this RMS in 8-bit levels; infinite for 0."""
    return 20 * math.log10(255 / rms) if rms > 0 else math.inf


def summarise(scores: Sequence[PictureScore]) -> dict[str, Spread]:
    """Spread of each of FIGURES over the pictures; a figure that no picture has is omitted."""
    spreads = {}
    for name in FIGURES:
        values = np.array([getattr(score, name) for score in scores], dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            spreads[name] = Spread(
                count=len(values),
                mean=float(values.mean()),
                least=float(values.min()),
                most=float(values.max()),
                percentiles={q: float(np.percentile(values, q)) for q in PERCENTILES},
            )
    return spreads


def pooled_psnr(scores: Sequence[PictureScore]) -> float:
    """PSNR of the mean squared error over all pictures, equally weighted: the figure that papers quote."""
    if not scores:
        raise ValueError("no pictures to compute a PSNR from")
    return psnr_of(math.sqrt(float(np.mean([score.rms**2 for score in scores]))))


_TYPES = {"key": pa.string(), "cluster": pa.int32(), "max_abs_delta": pa.int32()}
_SCHEMA = pa.schema([(field.name, _TYPES.get(field.name, pa.float64())) for field in fields(PictureScore)])


def scores_to_parquet(scores: Iterable[PictureScore]) -> bytes:
    """A Parquet file with one row per picture, columns as in PictureScore."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(score) for score in scores], schema=_SCHEMA), sink)
    return sink.getvalue()


def scores_from_parquet(data: bytes, where: str) -> list[PictureScore]:
    """The inverse of scores_to_parquet. Raises InputError, naming `where`, for anything it did not write."""
    try:
        table = pq.read_table(io.BytesIO(data))
        if not table.schema.equals(_SCHEMA):
            raise ValueError("unexpected columns")
        return [PictureScore(**row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(where, error, "delete it; the report can be written without it") from None


def _middle(picture: Picture) -> Picture:
    """The picture, cropped to a central square of _MIDDLE pixels."""
    top, left = (max(0, (side - _MIDDLE) // 2) for side in picture.shape[:2])
    return picture[top : top + _MIDDLE, left : left + _MIDDLE]


def _surviving_share(delta: NDArray[np.float64], handled: NDArray[np.float64]) -> float:
    energy = float(np.sum(delta**2))
    return float(np.sum(handled * delta)) / energy if energy > 0 else math.nan


def _through_jpeg(picture: Picture) -> NDArray[np.float64]:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75, subsampling="4:2:0" if picture.ndim == 3 else -1)
    return np.asarray(Image.open(file), dtype=np.float64)


def _through_half_size(picture: Picture) -> NDArray[np.float64]:
    image = Image.fromarray(picture)
    half = (max(1, image.width // 2), max(1, image.height // 2))
    reduced = image.resize(half, Image.Resampling.BILINEAR)
    return np.asarray(reduced.resize(image.size, Image.Resampling.BILINEAR), dtype=np.float64)


def _ssim(original: Picture, protected: Picture) -> float:
    if min(original.shape[:2]) < _SSIM_WINDOW:
        return math.nan
    from skimage.metrics import structural_similarity  # imported here: it takes a second that most commands do not need

    first, second = (
        picture @ _GREY if picture.ndim == 3 else picture.astype(np.float64) for picture in (original, protected)
    )
    return float(structural_similarity(first, second, data_range=255, win_size=_SSIM_WINDOW))
