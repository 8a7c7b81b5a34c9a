"""Settings check themselves when built, and say what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.protection.options import parse_settings
from pipeline.errors import SettingsError
from pipeline.quantities import parse_epsilon
from pipeline.settings import Generator, Settings, clusters_for, settings_from


@pytest.mark.parametrize(("text", "value"), [("16/255", 16 / 255), ("0.0625", 0.0625), ("8 / 255", 8 / 255)])
def test_epsilon_is_a_number_or_a_fraction(text: str, value: float) -> None:
    assert parse_epsilon(text) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text", ["", "a", "1/0", "16//255"])
def test_other_epsilons_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="fraction like 16/255"):
        parse_epsilon(text)


@pytest.mark.parametrize("epsilon", [0, -1, 128 / 255, 0.5, 1, 16])
def test_epsilon_must_lie_between_0_and_what_eight_bits_hold(epsilon: float) -> None:
    with pytest.raises(SettingsError, match="--epsilon must be above 0 and at most 127/255"):
        Settings(epsilon=epsilon)
    assert Settings(epsilon=127 / 255).epsilon == 127 / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "jpeg:101"}, "jpeg:1 … jpeg:100"),
        ({"encode": "jpg"}, "is not one of same, lossless"),
        ({"distance": "l1"}, "--distance 'l1' is not one of kl, cosine, l2"),
        ({"clusters": 1}, "--clusters must be at least 2; it is 1"),
        ({"generator": "texture"}, "needs --key-file"),
        ({"generator": "texture", "key_file": "k", "clusters": 41}, "only 40 distinct frequency bands"),
        ({"key_file": "k"}, "--key-file is the secret of --generator texture"),
        ({"cluster_images": 39}, "--cluster-images 39 is less than the clusters that are fitted on them"),
        ({"cluster_images": 50, "clusters": 51}, "--cluster-images 50 is less than the clusters"),
        ({"generator": "network"}, "add --optimise-through surrogate"),
        ({"generator": "network", "optimise_through": "surrogate", "delta_size": 33}, "multiple of 4"),
        ({"train_images": "cluster"}, "needs --optimise-through surrogate"),
        ({"generator": "direct", "bound": "tanh_clamp"}, "use --bound project"),
        ({"generator_lr": 1e-3}, "--generator-lr only applies to --generator network, not distilled"),
        (
            {"generator": "network", "optimise_through": "surrogate", "step_size": 0.01},
            "--step-size only applies to --generator direct",
        ),
        ({"max_quarantine": 2}, "share between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_from(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_answered_with_near_matches() -> None:
    with pytest.raises(SettingsError, match="unknown option 'epsilonn'; did you mean epsilon"):
        settings_from({"epsilonn": 1})
    with pytest.raises(SettingsError, match="--preset 'uc' is not one of"):
        settings_from(preset="uc")


def test_the_paper_preset_holds_the_papers_settings() -> None:
    """Zhang et al. 2023, section 4.1 and the authors' code: RN50, p = 10, 16/255, KL, network, 224 crop."""
    paper = settings_from(preset="uc-paper")
    assert (paper.surrogate, paper.clusters, paper.epsilon) == ("torchvision:resnet50/IMAGENET1K_V1", 10, 16 / 255)
    assert (paper.generator, paper.bound, paper.distance, paper.size) == ("network", "tanh_clamp", "kl", "224")
    assert (paper.train_images, paper.batch_size, paper.permutation) == ("all", 256, "next")


def test_later_layers_win_over_earlier_ones_and_over_the_preset() -> None:
    assert settings_from({"clusters": 5}, {"clusters": 7}, preset="uc-paper").clusters == 7


@pytest.mark.parametrize(
    ("images", "generator", "clusters"),
    [
        *((100, "direct", 10), (4000, "direct", 10), (8000, "texture", 20), (10**7, "network", 40)),
        *((1, "distilled", 2), (5, "distilled", 5), (11, "direct", 10)),
        *((6599, "distilled", 10), (6600, "sample", 11), (6600, "distilled", 11), (10**7, "distilled", 40)),
    ],
)
def test_clusters_follow_the_number_of_images(images: int, generator: Generator, clusters: int) -> None:
    assert clusters_for(images, generator) == clusters


def test_steps_are_what_the_generator_needs_unless_they_are_given() -> None:
    assert (settings_from().generator, settings_from().steps) == ("distilled", 1500)
    assert Settings(generator="sample").steps == 30
    assert Settings(generator="direct").steps == settings_from({"generator": "direct"}).steps == 100
    assert settings_from({"steps": 7}).steps == settings_from({"steps": 7, "generator": "direct"}).steps == 7
    assert settings_from(preset="uc-paper").for_images(3680).steps == 750  # Pets: 50 passes over 15 batches of 256
    assert settings_from({"steps": 7}, preset="uc-paper").for_images(3680).steps == 7
    with pytest.raises(SettingsError, match="--steps must be at least 1; it is 0"):
        settings_from({"steps": 0})


def test_epochs_are_steps_by_the_number_of_images_the_last_batch_included() -> None:
    ten = settings_from({"epochs": 10, "batch_size": 64}, preset="uc-paper")
    assert [ten.for_images(images).steps for images in (1, 64, 65, 127_000)] == [10, 10, 20, 10 * 1985]
    assert ten.for_images(65).epochs is None
    assert settings_from({"generator": "direct", "steps": 9}).for_images(10**6).steps == 9
    for given, words in (
        ({"epochs": 3, "steps": 9, "generator": "direct"}, "--steps and --epochs contradict each other"),
        ({"epochs": 3}, "--epochs only applies to --generator direct and network, not distilled"),
        ({"epochs": 0, "generator": "direct"}, "--epochs must be at least 1; it is 0"),
    ):
        with pytest.raises(SettingsError, match=words):
            settings_from(given)


def test_all_images_to_fit_on_are_all_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    places = ["--input", "a", "--output", "b"]
    (tmp_path / "run.yaml").write_text("fit_images: all\n")
    for options in (["--fit-images", "all"], ["--config", str(tmp_path / "run.yaml")], ["--preset", "uc-paper"]):
        assert parse_settings([*places, *options]).fit_images is None
    assert parse_settings([*places, "--fit-images", "7", "--preset", "uc-paper"]).fit_images == 7
    assert parse_settings(places).fit_images == 10_000


def test_suffixes_that_are_kept_are_named_one_by_one_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    places = ["--input", "a", "--output", "b"]
    many = parse_settings([*places, "--keep-sidecar", "seg.png", "npy", "--keep-sidecar", "mask.png"])
    assert many.keep_sidecar == ["mask.png", "npy", "seg.png"]
    (tmp_path / "run.yaml").write_text("keep_sidecar: [seg.png, npy]\n")
    again = parse_settings([*places, "--config", str(tmp_path / "run.yaml")])
    assert again.keep_sidecar == ["npy", "seg.png"]


def test_what_was_given_is_told_from_a_default_and_from_a_preset() -> None:
    assert settings_from({"epsilon": 16 / 255}, preset="uc-paper").given == {"epsilon"}
    assert settings_from().given == frozenset()


def test_the_largest_sign_step_is_in_pixel_units() -> None:
    given = ["--input", "a", "--output", "b"]
    assert parse_settings([*given, "--generator", "direct", "--step-size", "4/255"]).step_size == pytest.approx(4 / 255)
    network = [*given, "--generator", "network", "--optimise-through", "surrogate", "--generator-lr", "1e-3"]
    assert parse_settings(network).generator_lr == 1e-3
    with pytest.raises(SettingsError, match="--step-size: 'much' is not a change of a pixel such as 8/255"):
        parse_settings([*given, "--step-size", "much"])
