"""What is refused before a run starts, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.options import parse_settings
from jobs.prepare import prepare
from pipeline.errors import InputError, SettingsError
from pipeline.settings import EMBEDDED_SURROGATE
from tests import runs
from tests.test_protection import LEVELS, made


@pytest.mark.parametrize("epsilon", ["16/255", "4/255"])  # one of them is the default
def test_another_epsilon_than_that_of_a_given_protection_is_refused(tmp_path: Path, epsilon: str) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    file = tmp_path / "protection.safetensors"
    file.write_bytes(made(epsilon=8 / 255, levels=LEVELS // 2).to_bytes())
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--protection", str(file)]
    with pytest.raises(SettingsError) as caught:
        prepare(parse_settings([*options, "--epsilon", epsilon]))
    assert str(caught.value) == (f"--epsilon {epsilon}: {file} was made for 8/255; leave --epsilon away, or fit anew")
    (tmp_path / "settings.yaml").write_text(f"epsilon: {epsilon}\n")
    with pytest.raises(SettingsError, match="was made for 8/255"):
        prepare(parse_settings([*options, "--config", str(tmp_path / "settings.yaml")]))


@pytest.mark.parametrize("content", ["{}", '{"fingerprint": 1}', "not JSON"])  # of another version, or damaged
def test_a_run_that_is_not_understood_is_not_resumed_but_may_be_overwritten(tmp_path: Path, content: str) -> None:
    runs.write_collection(tmp_path / "in", shards=1, per_shard=4)
    record = tmp_path / "out/_scumble/run.json"
    record.parent.mkdir(parents=True)
    record.write_text(content)
    options = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--clusters", "2"]
    options += ["--surrogate", EMBEDDED_SURROGATE, "--surrogate-size", "64"]
    with pytest.raises(InputError, match="run.json is damaged, or of another version of Scumble"):
        prepare(parse_settings(options))
    assert len(prepare(parse_settings([*options, "--overwrite"])).plan.left) == 1
    assert not record.exists()
