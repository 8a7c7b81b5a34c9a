"""Figures of a picture against hand-made arrays and scikit-image."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.measures.scores import pooled_psnr, score_picture, scores_from_parquet, scores_to_parquet, summarise
from pipeline.shards.photographs import photograph


def flat(level: int) -> np.ndarray:
    return np.full((16, 16, 3), level, dtype=np.uint8)


def photo() -> np.ndarray:
    return photograph("astronaut")[100:228, 150:278]


def protected_by(delta: np.ndarray) -> np.ndarray:
    return np.clip(photo().astype(np.int16) + delta, 0, 255).astype(np.uint8)


def checkerboard(cell: int, levels: int = 8) -> np.ndarray:
    y, x = np.indices((128, 128)) // cell
    return (levels * np.where((y + x) % 2, 1, -1))[:, :, None].repeat(3, axis=2)


def test_an_offset_of_four_levels_scores_as_computed_by_hand():
    score = score_picture("k", 2, flat(100), flat(104))
    assert (score.key, score.cluster, score.max_abs_delta, score.rms) == ("k", 2, 4, 4.0)
    assert score.psnr == pytest.approx(20 * math.log10(255 / 4))
    assert score.survives_jpeg75 == pytest.approx(1.0, abs=0.3)  # flat blocks: quantised means
    assert score.survives_half_size == pytest.approx(1.0)


def test_one_changed_value_in_768_gives_its_share_of_the_rms():
    changed = flat(100)
    changed[3, 4, 1] = 84
    score = score_picture("k", 0, flat(100), changed)
    assert score.max_abs_delta == 16
    assert score.rms == pytest.approx(16 / math.sqrt(16 * 16 * 3))


def test_nothing_changed_gives_infinite_psnr_and_no_surviving_share():
    score = score_picture("k", 0, photo(), photo())
    assert (score.max_abs_delta, score.psnr, score.ssim) == (0, math.inf, 1.0)
    assert math.isnan(score.survives_jpeg75)
    assert math.isnan(score.survives_half_size)


def test_psnr_and_ssim_agree_with_scikit_image_on_float():
    noise = np.random.default_rng(0).integers(-16, 17, photo().shape)
    before, after = photo(), protected_by(noise)
    score = score_picture("k", 0, before, after)
    assert score.psnr == pytest.approx(peak_signal_noise_ratio(before / 255.0, after / 255.0, data_range=1))
    # rgb2gray weighs by BT.709, we by BT.601: equal on grey noise, hence near here
    reference = structural_similarity(rgb2gray(before), rgb2gray(after), data_range=1, win_size=7)
    assert score.ssim == pytest.approx(reference, abs=0.03)
    grey = score_picture("k", 0, before[:, :, 0], after[:, :, 0])
    assert grey.ssim == pytest.approx(
        structural_similarity(before[:, :, 0] / 255.0, after[:, :, 0] / 255.0, data_range=1, win_size=7)
    )


def test_fine_grain_dies_in_a_resize_and_coarse_blocks_survive():
    fine = score_picture("k", 0, photo(), protected_by(checkerboard(1)))
    coarse = score_picture("k", 0, photo(), protected_by(checkerboard(32)))
    assert abs(fine.survives_half_size) < 0.1
    assert coarse.survives_half_size > 0.9
    colour_grain = score_picture("k", 0, photo(), protected_by(checkerboard(1) * [1, 0, -1]))
    assert colour_grain.survives_jpeg75 < 0.1  # 4:2:0 averages it away
    assert coarse.survives_jpeg75 > 0.9


def test_the_surviving_share_of_jpeg_is_the_projection_of_what_pillow_decodes():
    before, after = photo(), protected_by(checkerboard(8))

    def decoded(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=75)
        return np.asarray(Image.open(file)).astype(float).ravel()

    delta = (after.astype(float) - before).ravel()
    expected = np.linalg.lstsq(delta[:, None], decoded(after) - decoded(before), rcond=None)[0][0]
    assert score_picture("k", 0, before, after).survives_jpeg75 == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1), (6, 300, 3), (3, 7)])
def test_tiny_and_grey_pictures_have_figures_but_no_ssim(shape):
    before = np.full(shape, 50, dtype=np.uint8)
    score = score_picture("k", 0, before, before + np.uint8(10))
    assert score.rms == 10
    assert math.isnan(score.ssim)


def test_pictures_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="both must be uint8 and of equal shape"):
        score_picture("k", 0, flat(0), flat(0)[:8])


def test_summary_leaves_out_what_is_not_finite_and_pools_mean_squared_errors():
    scores = [score_picture(str(i), 0, flat(100), flat(100 + i)) for i in (0, 3, 4)]
    spreads = summarise(scores)
    assert spreads["psnr"].count == 2
    assert (spreads["rms"].least, spreads["rms"].most) == (0, 4)
    assert spreads["rms"].percentiles[50] == 3
    assert pooled_psnr(scores) == pytest.approx(20 * math.log10(255 / math.sqrt(25 / 3)))


def test_scores_come_back_from_parquet_as_they_were():
    scores = [score_picture(f"a/{i}", i, flat(100), flat(100 + i)) for i in (1, 2)]
    assert scores_from_parquet(scores_to_parquet(scores), "scores") == scores
    assert scores_from_parquet(scores_to_parquet([]), "scores") == []


def test_of_a_huge_picture_the_middle_is_scored_but_the_bound_is_looked_for_everywhere():
    rng = np.random.default_rng(0)
    original = rng.integers(40, 200, (2060, 2100, 3), dtype=np.uint8)
    protected = original.copy()
    protected[0, 0, 0] += 16
    corner = score_picture("a", 0, original, protected)
    assert corner.max_abs_delta == 16
    assert corner.rms == 0
    protected[6:-6, 26:-26] += 8
    both = score_picture("a", 0, original, protected)
    assert (both.max_abs_delta, both.rms) == (16, 8.0)
    inside = score_picture("a", 0, original[6:-6, 26:-26], protected[6:-6, 26:-26])
    assert (both.ssim, both.survives_jpeg75) == (inside.ssim, inside.survives_jpeg75)
