"""The help of every command: each default is said once, as the settings have it, and research stands last."""

from __future__ import annotations

import argparse
import re

import pytest

from jobs.baselines.options import baseline_parser
from jobs.doctor import doctor_parser
from jobs.evaluation.options import evaluation_parser
from jobs.one_for_all.options import one_for_all_parser
from jobs.packing.options import pack_parser, unpack_parser
from jobs.protection.options import protection_parser
from jobs.shared.cli import Parser, defaults_of
from jobs.uploads.options import uploads_parser
from pipeline.baselines.settings import BaselineRunSettings
from pipeline.errors import SettingsError
from pipeline.one_for_all.settings import OneForAllSettings
from pipeline.packing.settings import PackSettings, UnpackSettings
from pipeline.quantities import parse_bytes, parse_epsilon, parse_seconds
from pipeline.relearning.evaluation import EvaluationSettings
from pipeline.settings import Settings
from pipeline.uploads.settings import UploadSettings

PARSERS = {
    protection_parser: Settings,
    baseline_parser: BaselineRunSettings,
    evaluation_parser: EvaluationSettings,
    one_for_all_parser: OneForAllSettings,
    uploads_parser: UploadSettings,
    pack_parser: PackSettings,
    unpack_parser: UnpackSettings,
}
SAID_BY_HAND = {"steps"}  # 0 stands for the steps of the generator
RESEARCH = {
    protection_parser: {"permutation", "train_images", "distance", "bound", "optimise_through", "plain"},
    evaluation_parser: {"labellings", "shares", "recipe"},
    one_for_all_parser: {"loss", "bound", "select_by"},
}


def action_help(parser: Parser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action)


@pytest.mark.parametrize("make", PARSERS)
def test_help_names_every_default_once_and_it_is_that_of_the_settings(make) -> None:
    parser, defaults = make(), defaults_of(PARSERS[make])
    for action in parser._actions:
        said = re.findall(r"\(default: (.*?)\)$", action_help(parser, action))
        assert action_help(parser, action).count("default") == len(said) <= 1
        value = defaults.get(action.dest)
        if isinstance(value, bool) or value in (None, "", ()) or action.dest in SAID_BY_HAND:
            continue
        (text,) = said
        if isinstance(value, tuple):
            assert text == ",".join(map(str, value))
        else:
            typed = action.type(text) if action.type else text
            assert typed == pytest.approx(value) if isinstance(value, float) else typed == value


@pytest.mark.parametrize("make", RESEARCH)
def test_what_only_research_needs_stands_last(make) -> None:
    *others, last = make()._action_groups
    assert last.title == "research options"
    assert {action.dest for action in last._group_actions} >= RESEARCH[make]
    assert not {action.dest for group in others for action in group._group_actions} & RESEARCH[make]


def test_a_default_is_written_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="job", defaults={"bound": 8 / 255, "after": 90.0, "size": 3 << 20, "names": ("a", "b")})
    for flag, kind in (
        ("--bound", parse_epsilon),
        ("--after", parse_seconds),
        ("--size", parse_bytes),
        ("--names", str),
    ):
        parser.add_argument(flag, type=kind, metavar="X", help="what")
    parser.add_argument("--share", type=float, default=0.1, metavar="X", help="what")
    parser.add_argument("--now", action="store_true", help="what")
    lines = parser.format_help().splitlines()[-6:]
    told = [re.sub(r" +", " ", line).strip() for line in lines]
    assert told == [
        "--bound X what (default: 8/255)",
        "--after X what (default: 90s)",
        "--size X what (default: 3M)",
        "--names X what (default: a,b)",
        "--share X what (default: 0.1)",
        "--now what",
    ]


def test_every_option_of_the_doctor_has_a_help_too() -> None:
    assert all(action.help for action in doctor_parser()._actions)


def test_members_are_limited_in_units() -> None:
    assert vars(protection_parser().parse_args(["--max-member-bytes", "1M"]))["max_member_bytes"] == 1 << 20
    with pytest.raises(SettingsError):
        protection_parser().parse_args(["--max-member-bytes", "much"])
