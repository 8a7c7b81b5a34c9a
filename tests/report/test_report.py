"""The page: complete without anything outside of it, honest in its first line, safe with hostile names."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.clusters.clustering import ClusterQuality, ClusterReport
from pipeline.errors import Reason
from pipeline.measures.gallery import GallerySample
from pipeline.measures.removal import RemovalCheck
from pipeline.measures.scores import score_picture
from pipeline.records import Rejection
from pipeline.report.report_page import ClusterRow, ReportData, StageRate, removal_sentence, write_report
from pipeline.shards.photographs import photograph
from tests.support.pages import Page, check_self_contained


def removal_check(level: float) -> RemovalCheck:
    rng = np.random.default_rng(1)

    def around(center: float) -> tuple[float, ...]:
        return tuple(float(value) for value in rng.normal(center, 0.04, 6).clip(-1, 1))

    return RemovalCheck(
        num_images=1_600,
        known={"mean": around(level - 0.3), "high_pass": around(level - 0.1), "iterated": around(level)},
        blind={"mean": around(level - 0.35), "high_pass": around(level - 0.15), "iterated": around(level)},
        blind_purity=0.93,
        blind_left=0.41,
        per_sample=False,
    )


def realistic() -> ReportData:
    """What a run over real photographs looks like, with a block delta per cluster."""
    rng = np.random.default_rng(0)
    gallery, scores = [], []
    for cluster, name in enumerate(("astronaut", "coffee", "chelsea", "rocket", "brick", "coins")):
        delta = 16 * rng.choice([-1, 1], (8, 8, 3)).repeat(8, 0).repeat(8, 1)
        for number in range(20):
            y, x = rng.integers(0, 180, 2)
            before = photograph(name)[y : y + 64, x : x + 64]
            delta_here = delta[:, :, 0] if before.ndim == 2 else delta
            after = np.clip(before.astype(int) + delta_here, 0, 255).astype(np.uint8)
            scores.append(score_picture(f"{name}-{number}", cluster, before, after))
        gallery.append(GallerySample(f"{name}-train-0007", cluster, before, after))
    return ReportData(
        input_url="s3://archive/photographs",
        output_url="s3://archive/photographs-protected",
        method="Unlearnable Clusters, deltas optimised directly through a colour-robust proxy",
        epsilon=16 / 255,
        fingerprint="4f0c" * 16,
        num_protected=1_594,
        num_quarantined=6,
        num_shards=7,
        input_image_bytes=11_030_112,
        output_image_bytes=14_802_331,
        finished="2026-11-21 11:20 UTC",
        stages=(
            StageRate("embed", 1_600, 31.2, 11_030_112),
            StageRate("cluster", 1_600, 2.4),
            StageRate("fit", 1_600, 74.1),
            StageRate("apply", 1_600, 5.9, 14_802_331),
        ),
        clusters=tuple(
            ClusterRow(
                index=i,
                images=int(rng.integers(120, 400)),
                target_cluster=(i + 1) % 6,
                moved=float(moved),
                moved_clean=0.01 * i,
                losses=tuple(9 * np.exp(-np.arange(50) / 18) + rng.normal(0, 0.12, 50) + 1 + i / 3),
            )
            for i, moved in enumerate((0.62, 0.71, 0.12, 0.55, 0.48, 0.66))
        ),
        clustering=ClusterReport(96, (16,) * 6, 812.3, 31, 0, (812.3, 901.7), ClusterQuality(0.21, 0.91)),
        gallery=tuple(gallery),
        removal=removal_check(0.91),
        scores=tuple(scores),
        quarantine={"undecodable": 4, "too-many-pixels": 2},
        rejections=(
            Rejection("upload-17", "upload-17.jpg", Reason.UNDECODABLE, "image file is truncated (3 bytes)"),
            Rejection("poster", "poster.png", Reason.TOO_MANY_PIXELS, "40000 x 30000 pixels, limit 100000000"),
        ),
        settings={"epsilon": 16 / 255, "steps": 100, "surrogate": "timm:tf_efficientnet_lite0", "seed": 0},
        versions={"torch": "2.15.0", "pillow": "12.1.0"},
    )


def least() -> ReportData:
    """Only what every run knows."""
    return ReportData(
        input_url="in",
        output_url="out",
        method="Unlearnable Clusters",
        epsilon=8 / 255,
        fingerprint="0" * 64,
        num_protected=1,
        num_quarantined=0,
        num_shards=1,
        input_image_bytes=0,
        output_image_bytes=0,
    )


@pytest.fixture(scope="module")
def html() -> str:
    return write_report(realistic())


@pytest.mark.parametrize("make", [realistic, least])
def test_the_page_parses_and_refers_to_nothing_outside_of_it(make):
    check_self_contained(write_report(make()))


def test_references_inside_charts_meet_exactly_one_id(html):
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    used = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'href="#([^"]*)"', html))
    assert used
    for target in used:
        assert ids.count(target) == 1, target


def test_the_first_line_says_so_when_nothing_was_measured():
    html = write_report(least())
    assert (
        "How much a model can still learn from them has not been measured here" in re.search(r"<h1>(.*?)</h1>", html)[1]
    )
    assert "they guarantee nothing" in html
    assert html.lower().count("not measured") >= 2


def test_hostile_names_are_shown_and_not_obeyed():
    evil = '<script>alert("x")</script>"><img src=http://evil onerror=alert(1)>'
    data = realistic()
    sample = data.gallery[0]
    hostile = ReportData(
        **{
            **vars(data),
            "gallery": (GallerySample(evil, 0, sample.original, sample.protected),),
            "rejections": (Rejection(evil, evil, Reason.UNSAFE_NAME, evil),),
            "settings": {evil: evil},
            "versions": {evil: evil},
            "stages": (StageRate(evil, 1, 1.0),),
            "quarantine": {evil: 1},
            "method": evil,
            "output_url": "s3://bucket/" + evil,
        }
    )
    page = Page(write_report(hostile))
    assert "script" not in page.tags
    assert not page.faults
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("data:") for name, value in page.attributes if name == "src")
    assert evil in page.text


def test_secrets_and_paths_stay_out_of_the_page():
    data = ReportData(
        **{
            **vars(least()),
            "input_url": "s3://AKIA123:hunter2@bucket/raw?token=abc",
            "settings": {
                "key_file": "/home/ann/secret.key",
                "surrogate_weights": "/home/ann/w.safetensors",
                "input": "s3://AKIA123:hunter2@bucket/raw",
                "steps": 100,
            },
        }
    )
    html = write_report(data)
    assert "s3://bucket/raw" in html
    assert not re.search(r"hunter2|AKIA|token|/home|secret", html)


def test_low_moved_shares_are_warned_of_relative_to_clean(html):
    assert "In 1 cluster (2), the delta moves less than a fifth of the images to the target cluster" in Page(html).text
    assert ClusterRow(0, 10, 1, moved=0.3, moved_clean=0.15).is_low
    assert not ClusterRow(0, 10, 1, moved=0.3, moved_clean=0.05).is_low
    assert not ClusterRow(0, 10).is_low


@pytest.mark.parametrize(
    ("level", "words"),
    [(0.9, "Expect little protection"), (0.5, "reveals part of the delta"), (0.1, "does not reveal the delta")],
)
def test_the_removal_check_is_put_in_plain_words(level, words):
    assert words in removal_sentence(removal_check(level))


def test_a_delta_that_only_the_known_clusters_reveal_is_not_called_hidden():
    hidden = removal_check(0.1)
    assert "does not reveal" in removal_sentence(hidden)
    revealed = replace(hidden, known={name: (0.95,) * 6 for name in hidden.known})
    assert "Expect little protection" in removal_sentence(revealed)


def test_the_same_data_gives_the_same_page(html):
    assert write_report(realistic()) == html


def test_a_large_picture_isshown_as_its_middle_and_amplified_by_ten():
    from pipeline.report.report_page import gallery_figures

    before = np.full((400, 300), 100, dtype=np.uint8)
    after = before.copy()
    after[200, 150] = 105
    gallery_figures = gallery_figures(GallerySample("k", 0, before, after))
    assert gallery_figures["is_cut"]
    assert (gallery_figures["width"], gallery_figures["height"], gallery_figures["most"]) == (300, 400, 5)
