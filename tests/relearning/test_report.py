"""The page of an evaluation: its first line by hand, complete by itself, safe with hostile names, honest about gaps."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.relearning.evaluation import CLEAN, CLEAN_PART
from pipeline.relearning.presets import PRESETS
from pipeline.relearning.regimes import NUMBERED, REGIMES
from pipeline.relearning.report.charts import Line, activations, curves
from pipeline.relearning.report.descriptions import describe_regime
from pipeline.relearning.report.evaluation_page import EvaluationAbout, write_relearning_report
from tests.support.pages import Page, check_self_contained

EVIL = '<script>alert("x")</script>"><img src=http://evil onerror=alert(1)> $x_{'


def row(protection=CLEAN, regime="nt", seed=0, last=0.8, **changed):
    """A row as run_trial returns it, without history and pictures."""
    part = float(changed.get("share", "samples:1").partition(":")[2])
    made = {
        "protection": protection,
        "fit": 0,
        "target": "small",
        "regime": regime,
        "labelling": "original",
        "share": "samples:1",
        "seed": seed,
        "epochs": 12,
        "recipe": "fast",
        "data": ("d1" if protection == CLEAN else "e2") * 32,
        "accuracy_last": last,
        "accuracy_best": min(1.0, last + 0.05),
        "accuracy_early_stop": last + 0.01,
        "accuracy_own_delta": None,
        "accuracy_wrong_delta": None,
        "accuracy_train": 0.97,
        "diverged": False,
        "num_train": 4750,
        "num_protected": 0 if protection in (CLEAN, CLEAN_PART) else round(4750 * part),
        "num_test": 1000,
        "num_classes": 10,
        "majority": 0.103,
        "images_per_second": 2100.0,
        "seconds": 27.0,
        "device": "cpu",
        "history": [],
        "pictures": [],
        "side": 32,
        "versions": "torch 2.15.0 numpy 2.3.1",
    } | changed
    return made | {"key": f"{protection}-{regime}-{made['target']}-{made['labelling']}-{made['share']}-{seed}"}


def history(last, epochs=12, *, staged=False, diverged=False, rng=None):
    """Learning as it goes: training batches learned, test images up to `last`; ST with ACM and rejected epochs."""
    rng = rng or np.random.default_rng(0)
    scores, count = [], 0
    for epoch in range(epochs):
        rise = 1 - np.exp(-(epoch + 1) / 3)
        figures = {}
        if staged:
            rejected = epoch > 1 and epoch % 3 == 0
            count += rejected
            acm = 1.2 + 0.3 * epoch + rng.normal(0, 0.1)
            figures = {"acm": acm, "acm_raw": 0.3 * acm, "count": float(count), "rejected": float(rejected)}
        scores.append(
            {
                "loss": float("nan") if diverged and epoch == epochs - 1 else 2.3 - 2 * rise,
                "accuracy_train": float(0.98 * rise),
                "accuracy_test": float(np.clip(last * rise + rng.normal(0, 0.01), 0, 1)),
                "accuracy_holdout": float(last * rise),
                "figures": figures,
            }
        )
    return scores


def picture(epoch, num=60):
    rng = np.random.default_rng(epoch)
    labels = rng.integers(0, 10, num)
    around = np.stack([np.cos(labels), np.sin(labels)], 1) * epoch
    points = (around + rng.normal(0, 1, (num, 2))).tolist()
    return {
        "epoch": epoch,
        "labels": labels.tolist(),
        "protected": (rng.random(num) < 0.7).tolist(),
        "pca": points,
        "tsne": (np.array(points) * 5).tolist(),
    }


LEARNED = {
    CLEAN: {"nt": 0.86, "nt-cg": 0.84, "st-cg": 0.79, "iss-jpeg10": 0.74, "subtract+cg": 0.83},
    "uc": {"nt": 0.21, "nt-cg": 0.36, "st-cg": 0.41, "iss-jpeg10": 0.52, "subtract+cg": 0.70},
    "sp": {"nt": 0.13, "nt-cg": 0.45, "st-cg": 0.62, "iss-jpeg10": 0.58, "subtract+cg": 0.66},
}
KEPT = {0.2: 0.83, 0.5: 0.76, 0.8: 0.61}  # accuracy of training on the clean part alone


def realistic(epochs=12):
    """Two protections, five regimes, two targets, three seeds, one diverged; shares and a second labelling."""
    rng = np.random.default_rng(5)
    rows = []
    for protection, learned in LEARNED.items():
        known = {} if protection == CLEAN else {"purity": 0.41, "adjusted_mutual_information": 0.28}
        known |= {"shortcut_accuracy": 0.41} if known else {}
        for regime, accuracy in learned.items():
            for target, loss in (("small", 0.0), ("resnet18", -0.03)):
                for seed in range(3):
                    diverged = (protection, regime, target, seed) == ("uc", "st-cg", "resnet18", 2)
                    last = 0.1 if diverged else float(accuracy + loss + rng.normal(0, 0.012))
                    with_deltas = protection == "uc"
                    rows.append(
                        row(
                            *(protection, regime, seed, last),
                            target=target,
                            diverged=diverged,
                            accuracy_own_delta=0.78 if with_deltas else None,
                            accuracy_wrong_delta=0.11 if with_deltas else None,
                            seconds=27.0 * (2.6 if regime == "st-cg" else 1) * (4 if target == "resnet18" else 1),
                            history=history(last, epochs, staged=regime == "st-cg", diverged=diverged, rng=rng),
                            pictures=[picture(e) for e in (1, 6, 12)] if seed == 0 and regime != "nt-cg" else [],
                            **known,
                        )
                    )
    for part, alone in KEPT.items():
        for regime in ("nt", "nt-cg"):
            for seed in range(3):
                share = f"samples:{part}"
                noise = rng.normal(0, 0.01, 3)
                rows.append(row(CLEAN_PART, regime, seed, alone + noise[0], share=share))
                rows.append(row("uc", regime, seed, alone + 0.01 + noise[1], share=share))
                rows.append(row("sp", regime, seed, alone + 0.02 + noise[2], share=share))
    for protection in LEARNED:
        for seed in range(3):
            last = 0.7 if protection == CLEAN else 0.5
            more = {"labelling": "concepts:20", "num_classes": 20, "majority": 0.07}
            rows.append(row(protection, "nt", seed, last, **more))
    return rows


ABOUT = EvaluationAbout(
    clean="s3://archive/cifar10/train",
    test="s3://archive/cifar10/test",
    protected={"uc": ("s3://archive/cifar10-uc",), "sp": ("s3://archive/cifar10-sp",)},
    settings={"regimes": tuple(LEARNED[CLEAN]), "targets": ("small", "resnet18"), "epochs": 12, "holdout": 0.05},
)


@pytest.fixture(scope="module")
def html() -> str:
    return write_relearning_report(realistic(), about=ABOUT)


def first_line(rows, about=ABOUT):
    html = write_relearning_report(rows, about=about)
    return heading(html)


def heading(html):
    return re.search(r"<h1>(.*?)</h1>", html, re.DOTALL)[1].replace("\u00a0", " ")


def test_the_page_parses_and_refers_to_nothing_outside_of_it(html):
    check_self_contained(html)
    check_self_contained(write_relearning_report([], about=ABOUT))


def test_references_inside_charts_meet_exactly_one_id(html):
    ids = [value for name, value in Page(html).attributes if name == "id"]
    used = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'href="#([^"]*)"', html))
    assert used
    assert all(ids.count(target) == 1 for target in used)


def test_the_first_line_is_the_largest_seed_mean_beside_the_clean_control_s():
    rows = [
        *(row("uc", "nt", 0, 0.10), row("uc", "nt", 1, 0.90)),  # mean .50
        *(row("uc", "nt-cg", 0, 0.55), row("uc", "nt-cg", 1, 0.57)),  # mean .56
        *(row("uc", "nt-cg", 0, 0.60, target="resnet18"), row("uc", "nt-cg", 1, 0.64, target="resnet18")),  # .62
        *(row(CLEAN, "nt", 0, 0.80), row(CLEAN, "nt", 1, 0.90)),  # mean .85
        *(row(CLEAN, "nt-cg", 0, 0.84), row(CLEAN, "nt-cg", 1, 0.83)),
    ]
    assert (
        first_line(rows) == "Relearned accuracy, worst case of 2 regimes on 2 targets: uc 62.0 %; clean images 85.0 %."
    )


def test_a_diverged_trial_is_marked_and_not_averaged():
    rows = [
        *(row("uc", "nt", 0, 0.40), row("uc", "nt", 1, 0.44), row("uc", "nt", 2, 0.99, diverged=True)),
        row("uc", "at", 0, 0.95, diverged=True),
        row(CLEAN, "nt", 0, 0.9),
    ]
    html = write_relearning_report(rows, about=ABOUT)
    assert first_line(rows) == (
        "Relearned accuracy, worst case: uc 42.0 % (of 2 regimes); clean images 90.0 % (of 1 regime)."
    )
    text = Page(html).text
    assert "42.0 ± 2.8 % (1 of 3 diverged)" in text  # sd of .40 and .44 is .0283
    assert "diverged (1 of 1)" in text
    assert "2 of 5 trials diverged" in text
    assert "not tried under the same regimes and targets" in text


def test_every_protection_stands_in_the_first_line_in_the_user_s_order(html):
    rows = [one for one in realistic() if one["labelling"] == "original" and one["share"] == "samples:1"]
    most = {}
    for name in LEARNED:
        cells = {}
        for one in rows:
            if one["protection"] == name and not one["diverged"]:
                cells.setdefault((one["regime"], one["target"]), []).append(one["accuracy_last"])
        most[name] = 100 * max(sum(cell) / len(cell) for cell in cells.values())
    assert heading(html) == (
        f"Relearned accuracy, worst case of 5 regimes on 2 targets: uc {most['uc']:.1f} %, sp {most['sp']:.1f} %; "
        f"clean images {most[CLEAN]:.1f} %."
    )


def test_partly_protected_rows_and_other_labels_do_not_decide_the_first_line():
    rows = [
        row("uc", "nt", 0, 0.3),
        row("uc", "nt", 0, 0.9, share="samples:0.5"),
        row("uc", "nt", 0, 0.8, labelling="concepts:20"),
        row(CLEAN_PART, "nt", 0, 0.95, share="samples:0.5"),
        row(CLEAN, "nt", 0, 0.85),
    ]
    assert first_line(rows) == "Relearned accuracy, worst case of 1 regime: uc 30.0 %; clean images 85.0 %."


def test_without_a_protection_or_a_control_the_first_line_says_so():
    unmeasured = "How much a target still learns from the protected images has not been measured."
    assert first_line([]) == unmeasured
    assert first_line([row(CLEAN)]) == unmeasured
    assert first_line([row("uc", diverged=True)]) == unmeasured
    assert first_line([row("uc", last=0.25)]).endswith("uc 25.0 %; the clean control was not measured.")


def test_a_section_without_data_says_why():
    page = Page(write_relearning_report([row("uc"), row(CLEAN)], about=EvaluationAbout(clean="c", test="t")))
    for words in (
        "the trials have no histories",
        "no regime of the ST family was tried",
        "no activations were kept",
        "all of them were protected",
        "the protections' clusters are not known",
        "the protections' deltas are not known",
        "One seed per cell",
    ):
        assert words in page.text, words
    text = Page(write_relearning_report([], about=ABOUT)).text
    assert all(words in text for words in ("no trial has finished", "Not recorded", "no trials on protected images"))


def test_the_sections_show_what_the_rows_hold(html):
    text = Page(html).text
    assert "Chance for 10 classes is 10.0 %" in text
    assert "most common test class gives 10.3 %" in text
    assert "Chance for 20 classes is 5.0 %" in text
    assert "the clean part alone" in text
    assert "41.0 %" in text  # purity
    assert "0.280" in text  # adjusted mutual information
    assert "78.0 %" in text  # own delta
    assert "11.0 %" in text  # another's
    assert "× 2.6" in text  # staged training beside ordinary
    assert "20 % of samples" in text
    assert "Showing 12 of 24 trainings" in text
    assert html.count('class="plain"') == 12
    assert "biased upwards" in text
    assert "may achieve more" in text


def test_share_curves_begin_at_the_clean_control_and_end_at_all_protected(html):
    table = re.search(r"figures by share of samples.*?</table>", html, re.DOTALL)[0]
    assert re.findall(r'<th class="n">(.*?)</th>', table) == ["0.0 %", "20.0 %", "50.0 %", "80.0 %", "100.0 %"]
    clean = np.mean([r["accuracy_last"] for r in realistic() if _cell(r) == (CLEAN, "nt", "small", "original")])
    line = re.search(r"<tr><td>uc</td><td><code>nt</code></td><td><code>small</code>.*?</tr>", table)[0]
    assert f'<td class="n">{100 * clean:.1f} ± ' in line
    alone = re.search(r"<tr><td>the clean part alone</td><td><code>nt</code>.*?</tr>", table)[0]
    assert alone.endswith('<td class="n">–</td></tr>')  # nothing is left to train on


def _cell(one):
    return one["protection"], one["regime"], one["target"], one["labelling"]


def test_hostile_names_are_shown_and_not_obeyed():
    rows = [
        row(
            name,
            EVIL,
            0,
            0.5,
            target=EVIL,
            device=EVIL,
            labelling=EVIL,
            recipe=EVIL,
            versions=EVIL,
            data=EVIL,
            purity=0.3,
            history=history(0.5, 3, staged=True),
            pictures=[picture(1)],
            share=share,
        )
        for name, share in ((EVIL, "samples:1"), (EVIL, "samples:0.5"), (CLEAN, "samples:1"))
    ]
    about = EvaluationAbout(clean=EVIL, test=EVIL, protected={EVIL: (EVIL,)}, settings={EVIL: EVIL})
    page = Page(write_relearning_report(rows, about=about))
    assert "script" not in page.tags
    assert not page.faults
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("data:") for name, value in page.attributes if name == "src")
    assert page.text.count(EVIL) > 8


def test_secrets_stay_out_of_the_page():
    secret = "s3://AKIA123:hunter2@bucket/raw?token=abc"
    settings = {"clean": secret, "test": secret, "protected": {"uc": secret}, "output": secret, "epochs": 12}
    about = EvaluationAbout(clean=secret, test=secret, protected={"uc": (secret,)}, settings=settings)
    html = write_relearning_report([row("uc")], about=about)
    assert html.count("s3://bucket/raw") == 3
    assert not re.search(r"hunter2|AKIA|token", html)


def test_the_page_says_how_many_samples_of_which_collection_were_left_out():
    words = "Samples that could not be read and were left out: clean 1,203, uc 2."
    page = Page(write_relearning_report([row("uc")], about=replace(ABOUT, left_out={CLEAN: 1203, "uc": 2})))
    assert words in page.text
    assert "left out" not in Page(write_relearning_report([row("uc")], about=ABOUT)).text


def test_the_same_rows_in_any_order_give_the_same_page():
    rows = [one | {"pictures": [], "history": one["history"][:2]} for one in realistic()]
    assert write_relearning_report(rows[::-1], about=ABOUT) == write_relearning_report(rows, about=ABOUT)


def test_rows_read_back_from_json_with_nan_make_a_page():
    import json

    broken = history(0.3, 4, staged=True, diverged=True)
    broken[-1]["figures"] |= {"acm": float("nan"), "acm_raw": float("nan")}
    rows = json.loads(json.dumps([row("uc", "st", 0, 0.1, history=broken, diverged=True), row(CLEAN)]))
    assert not Page(write_relearning_report(rows, about=ABOUT)).faults


def test_a_line_is_drawn_where_its_figures_are():
    """The path's end in the SVG, read back by its own axes: y = 0 and y = 1.02 are the ends of the vertical axis."""
    svg = curves([Line([1, 2, 3], [0.0, 0.51, 1.02], "#040404")], "t", label="accuracy")
    paths = re.findall(r'<path d="M ([^"]*)"[^>]*style="fill: none; stroke: var\(--protected\)', svg)
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", paths[0])]
    heights = numbers[1::2]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.01)
    assert heights[0] > heights[2]


def test_activations_without_a_tsne_map_are_drawn_alone():
    assert activations([picture(1, 5) | {"tsne": []}]).startswith("data:image/png;base64,")
    assert activations([]).startswith("data:image/png;base64,")


def test_regimes_are_put_in_words():
    assert describe_regime("iss-gray+st-cg").startswith("grayscale, training and test, then progressive staged")
    assert describe_regime("st-cg[kappa=2]").endswith("; kappa=2")
    assert describe_regime("leaked-pairs:100+cg").startswith("cleaned by a network trained on 100 leaked pairs")
    assert "(needs them), then colour jitter" in describe_regime("leaked-pairs:100+cg")
    assert describe_regime("of-tomorrow") == ""
    assert describe_regime("lowpass:8+cg").startswith("frequencies above 8 cycles per image filtered out, training")
    offered = {name for preset in PRESETS.values() for name in preset["regimes"]} | REGIMES.keys()
    assert [name for name in offered if not describe_regime(name)] == []
    assert [name for name in NUMBERED if not describe_regime(name)] == []


def test_the_page_says_what_the_denoiser_of_a_regime_gained():
    gained = {"denoiser_own_db": 4.12, "denoiser_here_db": 1.88}
    rows = [row("uc", "self-pairs", **gained), row(CLEAN, "self-pairs", denoiser_own_db=4.12), row("uc"), row(CLEAN)]
    page = Page(write_relearning_report(rows, about=replace(ABOUT, pairs=("s3://k:secret@other/a", "s3://other/b"))))
    assert re.search(r"self-pairs\s*uc\s*4\.1\s*1\.9", page.text)
    assert re.search(r"self-pairs\s*clean\s*4\.1\s*–", page.text)
    assert "pairs s3://other/a" in page.text
    assert "secret" not in page.text
    assert "Denoisers" not in Page(write_relearning_report(rows[2:], about=ABOUT)).text
