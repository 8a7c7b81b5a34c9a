"""A JPEG's own coding is kept while it keeps the delta; otherwise the next finer one that does, and it is counted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.deltas.apply import LaidDeltas, protect_sample, protect_shard
from pipeline.deltas.delta import LaidDelta
from pipeline.deltas.survival import ENOUGH, coding_for, survival
from pipeline.errors import Reason, SampleError
from pipeline.measures.estimate import TypicalDeltas
from pipeline.pictures.jpeg import JpegCoding, jpeg_header
from pipeline.records import Sample
from pipeline.settings import Settings
from pipeline.shards.tar import ShardWriter
from tests.support.samples import ExtremeDeltas, image_bytes, noise

SUBSAMPLED = 2


def coded(quality: int, subsampling: int = SUBSAMPLED) -> JpegCoding:
    return JpegCoding(JpegCoding.of_quality(quality).tables, subsampling)


def constant(levels: tuple[int, int, int], height: int = 40, width: int = 48) -> LaidDelta:
    return LaidDelta(np.broadcast_to(np.array(levels, np.int16), (height, width, 3)).copy())


def typical(side: int, *, has_colour: bool, epsilon: float = 16 / 255) -> LaidDelta:
    source = TypicalDeltas(epsilon, 72, has_colour=has_colour)
    return LaidDelta(source.delta_for(0, "", side, side))


def smooth(height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(noise(6, 8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def test_survival_is_the_share_along_the_delta() -> None:
    before = np.full((2, 2, 1), 100, np.uint8)
    protected = before + np.array([[[4], [0]], [[0], [3]]], np.uint8)  # energy 25
    assert survival(before, protected, protected) == 1
    assert survival(before, protected, before) == 0
    decoded = before + np.array([[[2], [9]], [[9], [0]]], np.uint8)  # 4 * 2 along it; the nines are across
    assert survival(before, protected, decoded) == pytest.approx(8 / 25)
    assert np.isnan(survival(before, before, decoded))


def test_survival_of_a_large_picture_does_not_overflow() -> None:
    before, protected = np.zeros((2000, 2000, 3), np.uint8), np.full((2000, 2000, 3), 127, np.uint8)
    assert survival(before, protected, protected) == 1  # an energy of 1.9e11


def test_a_coding_that_keeps_the_delta_is_kept() -> None:
    for coding in (coded(90), coded(50), JpegCoding(coded(75).tables, 1, progressive=True, restart=5)):
        assert coding_for(constant((16, 16, 16)), coding) == coding
    assert coding_for(typical(400, has_colour=False), coded(75)) == coded(75)
    assert coding_for(constant((0, 0, 0)), coded(1)) == coded(1)


def test_fine_grain_needs_finer_steps_than_coarse_tables_have() -> None:
    laid = typical(64, has_colour=False)
    chosen = coding_for(laid, coded(50))
    assert chosen in (coded(85), coded(90), coded(95))
    assert coding_for(laid, coded(95)) == coded(95)


def test_colour_finer_than_the_samples_of_colour_gets_a_sample_for_each_pixel() -> None:
    levels = np.zeros((64, 64, 3), np.int16)
    levels[:, :, 0] = np.where(np.indices((64, 64)).sum(0) % 2, 16, -16)  # a chequerboard in red
    assert coding_for(LaidDelta(levels), coded(97)).subsampling == 0
    grey = np.repeat(levels[:, :, :1], 3, axis=2)
    assert coding_for(LaidDelta(grey), coded(97)) == coded(97)
    assert coding_for(constant((16, -16, 8)), coded(97)) == coded(97)  # the same colour everywhere


def test_grey_pictures_are_judged_by_what_is_added_to_them() -> None:
    levels = np.zeros((64, 64, 3), np.int16)
    levels[:, :, 0], levels[:, :, 2] = 16, -16  # the mean is 0
    grey = JpegCoding(coded(30).tables[:1])
    assert coding_for(LaidDelta(levels), grey) == grey


@pytest.mark.parametrize(("side", "quality", "has_colour"), [(64, 50, False), (144, 85, True), (200, 30, False)])
def test_what_is_written_keeps_most_of_the_delta_and_says_so(side: int, quality: int, has_colour: bool) -> None:
    data = image_bytes(smooth(side, side), "JPEG", quality=quality, subsampling=SUBSAMPLED)
    source = TypicalDeltas(16 / 255, 72, has_colour=has_colour)
    sample = Sample("k", {"jpg": data})
    done = protect_sample(sample, LaidDeltas(source), 0, settings=Settings(), reread=1.0)
    before = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    after = np.asarray(Image.open(io.BytesIO(done.sample.members["jpg"]))).astype(int)
    delta = (before + source.delta_for(0, "", side, side)).clip(0, 255) - before
    assert done.survival == pytest.approx(((after - before) * delta).sum() / (delta * delta).sum())
    assert done.survival > ENOUGH - 0.01
    assert protect_sample(sample, LaidDeltas(source), 0, settings=Settings(), reread=0.0).survival is None


def test_a_shard_counts_what_it_had_to_code_more_finely(tmp_path: Path) -> None:
    coarse = image_bytes(smooth(64, 64), "JPEG", quality=40)
    fine = image_bytes(smooth(64, 64), "JPEG", quality=98, subsampling=0)
    png = image_bytes(smooth(64, 64))
    samples = [Sample(f"{number:03}", {"jpg": coarse}) for number in range(40)]
    samples += [Sample("fine", {"jpg": fine}), Sample("png", {"png": png})]
    deltas, clusters = LaidDeltas(ExtremeDeltas(64)), dict.fromkeys([sample.key for sample in samples], 0)
    with ShardWriter(tmp_path / "out.tar", compressed=False) as writer:
        outcome = protect_shard(samples, writer, deltas, clusters, settings=Settings())
    assert outcome.num_finer == 40
    assert 0 < outcome.num_reread < 20
    assert 0.9 < outcome.survival / outcome.num_reread <= 1.1
    with ShardWriter(tmp_path / "q.tar", compressed=False) as writer:
        fixed = protect_shard(samples, writer, deltas, clusters, settings=Settings(encode="jpeg:60"))
    assert fixed.num_finer == 0
    header = jpeg_header(protect_sample(samples[0], deltas, 0, settings=Settings()).sample.members["jpg"])
    assert header is not None
    assert header.coding is not None
    assert header.coding != coded(40)


@pytest.mark.parametrize("taken", ["left.png", "LEFT.PNG"])
def test_an_image_that_would_get_the_name_of_a_kept_sidecar_is_refused_and_neither_is_lost(taken: str) -> None:
    members = {"left.jpg": image_bytes(noise(32, 32), "JPEG"), taken: image_bytes(noise(32, 32, 1))}
    settings = Settings(encode="lossless", keep_sidecar=("left.png",))
    for ordered in (members, dict(reversed(members.items()))):
        with pytest.raises(SampleError, match="would be called left.png, as a sidecar of it is") as caught:
            protect_sample(Sample("k", ordered), LaidDeltas(ExtremeDeltas()), 0, settings=settings)
        assert caught.value.reason is Reason.DUPLICATE_MEMBER
