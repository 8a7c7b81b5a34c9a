"""concepts.py: a bank that is read again, names that are lacking, and criteria computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import concepts
from pipeline.errors import InputError
from pipeline.relearning.labels.sweep import Grouping, groupings
from pipeline.surrogates.concepts import ConceptBank, imagenet_bank, read_bank
from tests.support import runs

BUILT_IN = ["--surrogate", "timm:tf_efficientnet_lite0"]


def test_a_bank_of_names_is_that_of_the_classifier_and_its_groups_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["goldfish", "tench", "airliner", "pizza", "koala"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    given = [*BUILT_IN, "--concepts", str(tmp_path / "names.txt"), "--output", str(tmp_path / "b.safetensors")]
    for _ in range(2):
        assert concepts.main([*given, "--groups", "2-3"]) == 0
    bank = read_bank(tmp_path / "b.safetensors")
    assert bank.names == tuple(names)
    rows = [next(row for row, known in enumerate(imagenet_bank().names) if name in known) for name in names]
    assert np.array_equal(bank.embeddings, imagenet_bank().embeddings[rows])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[:4]][1:3] == ["groups       2", "groups       3"]
    page = (tmp_path / "b.html").read_text()
    assert page.count("<svg") == 3
    (tmp_path / "names.txt").write_text("goldfish\npizza\nkoala")
    code, line = runs.refusal(concepts.main, *given)
    assert (code, line) == (
        1,
        f"error: {tmp_path}/b.safetensors is there already and differs: choose another --output\n",
    )


def test_names_that_a_classifier_lacks_are_shown_with_near_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("Persian\ngoldfish\nzzzzzzzz\n")
    output = tmp_path / "b.safetensors"
    given = [*BUILT_IN, "--concepts", str(tmp_path / "names.txt"), "--output", str(output)]
    with pytest.raises(InputError, match="lacks 2 of the names"):
        concepts.main(given)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("lacking      Persian; did you mean persian cat")
    assert second == "lacking      zzzzzzzz"
    assert not output.exists()


def test_the_criteria_of_two_pairs_on_a_line() -> None:
    bank = ConceptBank(("a", "b", "c", "d"), np.array([[0], [1], [10], [11]], np.float32))
    (found,) = groupings(bank, [2], seed=0)
    silhouette = ((10.5 - 1) / 10.5 + (9.5 - 1) / 9.5) / 2
    assert found == Grouping(2, pytest.approx(1.0), pytest.approx(silhouette), pytest.approx(200.0))


@pytest.mark.parametrize("options", [["--groups", "5-2"], ["--groups", "many"], ["--output", "bank.txt"]])
def test_what_cannot_be_is_refused_before_anything_is_loaded(options: list[str]) -> None:
    code, line = runs.refusal(concepts.main, "--output", "b.safetensors", *options)
    assert (code, line.count("\n")) == (2, 1)
