"""Plan = listing - commits; two truths are a conflict that names both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.records import Commit, Shard
from pipeline.runs.fingerprint import ingredients_of
from pipeline.runs.plan import make_plan
from pipeline.runs.run_record import RunRecord, check_same_run
from pipeline.runs.transaction import check_same_commit
from pipeline.settings import Settings

SHARDS = [Shard("b.tar", 20, "e2"), Shard("a.tar", 10, "e1")]


def fingerprint(settings: Settings, shards: list[Shard] = SHARDS, weights: str = "w") -> str:
    return ingredients_of(settings, shards, weights_sha256=weights).fingerprint


def test_what_is_left_is_the_listing_without_the_commits_in_order() -> None:
    plan = make_plan(SHARDS, "f", ["b.tar"])
    assert [shard.name for shard in plan.shards] == ["a.tar", "b.tar"]
    assert [shard.name for shard in plan.left] == ["a.tar"]
    assert plan.total_bytes == 30


def test_a_hundred_thousand_shards_with_half_committed_leave_the_other_half() -> None:
    shards = [Shard(f"s/{i:07d}.tar", i, f"e{i}") for i in range(100_000)]
    assert len(make_plan(shards, "f", (shard.name for shard in shards[::2])).left) == 50_000


def test_an_empty_listing_and_a_strange_commit_are_refused() -> None:
    with pytest.raises(InputError, match="no shards"):
        make_plan([], "f", [])
    with pytest.raises(ConflictError, match=r"a commit for z\.tar, which is not in the input"):
        make_plan(SHARDS, "f", ["z.tar"])


@pytest.mark.parametrize("change", [{"epsilon": 8 / 255}, {"seed": 1}, {"encode": "lossless"}, {"clusters": 12}])
def test_whatever_decides_bytes_changes_the_fingerprint(change: dict[str, object]) -> None:
    base = Settings(input="a", output="b")
    assert fingerprint(replace(base, **change)) != fingerprint(base)


@pytest.mark.parametrize("change", [{"workers": 3}, {"input": "c"}, {"debug": True}, {"max_quarantine": 0.5}])
def test_what_does_not_decide_bytes_leaves_the_fingerprint_alone(change: dict[str, object]) -> None:
    base = Settings(input="a", output="b")
    assert fingerprint(replace(base, **change)) == fingerprint(base)


def test_the_class_of_device_decides_bytes_but_not_its_share() -> None:
    shares = [fingerprint(Settings(gpus_per_worker=share)) for share in (0.0, 0.25, 1.0)]
    assert shares[0] != shares[1] == shares[2]


def test_another_version_of_one_input_shard_or_other_weights_change_the_fingerprint() -> None:
    base = Settings()
    assert fingerprint(base, [SHARDS[0], Shard("a.tar", 10, "other")]) != fingerprint(base)
    assert fingerprint(base, weights="v") != fingerprint(base)


def test_another_run_in_the_output_is_refused_with_the_differing_settings() -> None:
    def record(settings: Settings) -> RunRecord:
        ingredients = ingredients_of(settings, SHARDS, weights_sha256="w")
        return RunRecord.of(ingredients, settings, make_plan(SHARDS, ingredients.fingerprint, ()))

    check_same_run(record(Settings(workers=1)), record(Settings(workers=2)), "out")
    with pytest.raises(ConflictError) as caught:
        check_same_run(record(Settings(seed=1)), record(Settings(seed=2, encode="lossless")), "out")
    assert str(caught.value) == (
        "out belongs to another run (encode was same, is lossless; seed was 1, is 2): "
        "use its settings to resume it, choose another --output, or add --overwrite"
    )


def test_a_commit_with_other_bytes_is_a_conflict_that_names_both_digests() -> None:
    ours = Commit("f", "a.tar", 1, "e", 2, "a" * 64, "p", 1, 0, 1, 1, 1, 16, {}, {}, {"read": 1.0})
    check_same_commit(ours, replace(ours, seconds={"read": 9.0}))
    with pytest.raises(ConflictError, match="aaaaaaaaaaaaaaaa.*bbbbbbbbbbbbbbbb|bbbbbbbbbbbbbbbb.*aaaaaaaaaaaaaaaa"):
        check_same_commit(ours, replace(ours, output_sha256="b" * 64))


def test_a_commit_comes_back_from_json() -> None:
    ours = Commit("f", "a.tar", 1, "e", 2, "a" * 64, "p", 1, 0, 1, 1, 1, 16, {"empty": 1}, {"3": 1}, {"read": 1.0})
    assert Commit.from_json(ours.to_json()) == ours
