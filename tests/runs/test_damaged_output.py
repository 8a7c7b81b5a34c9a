"""Whatever of an output's records is damaged, each command over it ends with one line that names the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import report, status, verify
from pipeline import layout
from pipeline.errors import Reason
from pipeline.measures.scores import PictureScore, scores_to_parquet
from pipeline.records import Plan, Rejection, Shard, quarantine_from_bytes, quarantine_to_bytes
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.run_record import RunRecord
from pipeline.settings import Settings
from pipeline.storage.store import Store
from tests.support.runs import refusal
from tests.support.samples import commit_of

SHARD = Shard("a.tar", 7, "etag")
REJECTED = [Rejection("ü", "ü.jpg", Reason.EMPTY, "no bytes"), Rejection("k", "k.jpg", Reason.ANIMATED, "2 frames")]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-4],
    "a list": lambda data: b"[" + data.strip() + b"]",
    "null": lambda data: b"null",
    "not UTF-8": lambda data: data.replace(b'{"', b'{"\xff', 1),
    "of wrong types": lambda data: data.replace(b'"no bytes"', b"[7]").replace(
        b'"num_protected":1', b'"num_protected":{}'
    ),
    "without a field": lambda data: data.replace(b'"member"', b'"number"').replace(b'"num_protected":1,', b""),
}


def with_an_unknown_field(data: bytes) -> bytes:
    return data.replace(b"{", b'{"more":1,', 1)


@pytest.fixture
def output(tmp_path: Path) -> Store:
    """What a run of one shard leaves for its report, but for the shard itself."""
    store = Store(str(tmp_path))
    settings = Settings(input="in", output=store.url, clusters=4)
    ingredients = ingredients_of(settings, [SHARD], weights_sha256="w")
    plan = Plan((SHARD,), ingredients.fingerprint)
    store.put(layout.RUN, RunRecord.of(ingredients, settings, plan).to_bytes())
    commit = replace(commit_of(SHARD, plan.fingerprint), num_quarantined=2, quarantine={"empty": 1, "animated": 1})
    store.put(layout.commit(SHARD.name), commit.to_bytes())
    store.put(layout.quarantine(SHARD.name), quarantine_to_bytes(REJECTED))
    store.put(layout.PASSED_OVER, quarantine_to_bytes(REJECTED))
    store.put(layout.SCORES, scores_to_parquet([PictureScore("k", 0, 16, 9.0, 28.0, 0.9, 0.5, 0.5)]))
    return store


def ends_with_a_line(store: Store, name: str, *mains: Callable[[list[str] | None], int]) -> None:
    for main in mains:
        code, said = refusal(main, "--output", store.url)
        line = said.splitlines()[-1]
        assert (code, said.count("error: ")) == (1, 1), said
        assert line.startswith(f"error: {store.url}/{name}"), said
        assert " is damaged or from another version of Scumble (" in line
        assert re.search(r"\): (restore or delete|delete) it", line)


def test_a_whole_output_is_reported(output: Store) -> None:
    assert refusal(report.main, "--output", output.url) == (0, "")
    page = output.read(layout.REPORT).decode()
    assert "no bytes" in page
    assert "2 frames" in page


@pytest.mark.parametrize("damage", [lambda data: b"", *DAMAGE.values()], ids=["empty", *DAMAGE])
def test_a_damaged_commit(output: Store, damage: Callable[[bytes], bytes]) -> None:
    name = layout.commit(SHARD.name)
    output.put(name, damage(output.read(name)))
    ends_with_a_line(output, name, status.main, report.main, verify.main)


def test_a_commit_with_more_in_it_is_not_verified(output: Store) -> None:
    name = layout.commit(SHARD.name)
    output.put(name, with_an_unknown_field(output.read(name)))
    ends_with_a_line(output, name, verify.main)


@pytest.mark.parametrize("name", [layout.quarantine(SHARD.name), layout.PASSED_OVER])
@pytest.mark.parametrize("damage", [*DAMAGE.values(), with_an_unknown_field], ids=[*DAMAGE, "more"])
def test_a_damaged_quarantine(output: Store, name: str, damage: Callable[[bytes], bytes]) -> None:
    output.put(name, damage(output.read(name)))
    ends_with_a_line(output, name, report.main, verify.main)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"PAR1" + data])
def test_damaged_scores(output: Store, damage: Callable[[bytes], bytes]) -> None:
    output.put(layout.SCORES, damage(output.read(layout.SCORES)))
    ends_with_a_line(output, layout.SCORES, report.main)


def test_a_quarantine_comes_back_and_the_line_that_is_none_is_named() -> None:
    data = quarantine_to_bytes(REJECTED)
    assert quarantine_from_bytes(data, "file") == REJECTED
    with pytest.raises(Exception, match=r'^file, line 2, is damaged .* \(reason is "odd"\): restore or delete it$'):
        quarantine_from_bytes(data.replace(b"animated", b"odd"), "file")
