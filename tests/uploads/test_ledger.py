"""The ledger says of every object what was last done with it, whatever was compacted, by whom, or killed on the way."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.errors import ConflictError, InputError
from pipeline.storage.store import Store
from pipeline.uploads.ledger import Ledger, UnitCommit
from pipeline.uploads.segments import Row, read_known, values_of, write_segment


def row(name: str, etag: str = "1", version: int = 1, **fields: object) -> Row:
    values: dict[str, object] = {"size": 10, "kind": "image", "output": name, "protected": 1}
    values["output_sha256"] = "ab" * 32
    return Row(name, etag, version, **values | fields)  # type: ignore[arg-type]


def commit(ledger: Ledger, unit: str, *rows: Row) -> None:
    ledger.commit(UnitCommit(unit, "f" * 64, rows))


def test_what_was_committed_is_known_before_and_after_it_is_compacted(store: Store) -> None:
    ledger = Ledger(store)
    assert list(ledger.known()) == []
    commit(ledger, "u1", row("b.jpg"), row("ü 100% +.png", distance=0.5, cluster=3))
    commit(ledger, "u2", row("a.jpg", output="", protected=0, quarantined=1, reason="empty", detail="no bytes"))
    before = list(ledger.rows())
    assert [one.name for one in before] == ["a.jpg", "b.jpg", "ü 100% +.png"]
    ledger.compact(merge=True)
    assert store.list(layout.UPLOADS_COMMITS) == []
    assert list(ledger.rows()) == before
    assert list(ledger.known()) == [(one.name, one.etag, one.version) for one in before]
    (segment,) = ledger.manifest().segments
    assert (segment.rows, segment.protected, segment.quarantined) == (3, 2, 1)


def test_the_latest_version_wins_wherever_it_is(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    commit(ledger, "u1", row("a.jpg"), row("b.jpg"))
    ledger.compact(merge=True)
    commit(ledger, "u2", row("a.jpg", "2", 2))
    assert list(ledger.known()) == [("a.jpg", "2", 2), ("b.jpg", "1", 1)]
    ledger.compact(merge=False)
    assert len(ledger.manifest().segments) == 2
    assert list(ledger.known()) == [("a.jpg", "2", 2), ("b.jpg", "1", 1)]
    commit(ledger, "u3", row("a.jpg", "1", 3))  # changed back
    ledger.compact(merge=True)
    assert list(ledger.known()) == [("a.jpg", "1", 3), ("b.jpg", "1", 1)]
    assert len(ledger.manifest().segments) == 1


def test_names_that_are_not_utf8_are_kept_to_the_byte(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    commit(ledger, "u1", row("\udcff\udc80.jpg"), row("ü.jpg"), row("𝄞.jpg"))
    before = list(ledger.known())
    ledger.compact(merge=True)
    assert list(ledger.known()) == before
    assert {name for name, _, _ in before} == {"\udcff\udc80.jpg", "ü.jpg", "𝄞.jpg"}


def test_a_ledger_is_a_dictionary_whatever_is_done_in_which_order(tmp_path: Path) -> None:
    rng, store, model = random.Random(0), Store(str(tmp_path)), {}
    for step in range(120):
        ledger = Ledger(store)
        rows = []
        for name in rng.sample([f"{number:03d}.jpg" for number in range(300)], rng.randint(1, 12)):
            version = model[name].version + 1 if name in model else 1
            model[name] = row(name, f"e{step}", version)
            rows.append(model[name])
        commit(ledger, f"u{step}", *rows)
        if rng.random() < 0.4:
            ledger.compact(merge=rng.random() < 0.7)
        if step % 30 == 29:
            assert {one.name: one for one in ledger.rows()} == model
    ledger.compact(merge=True)
    assert len(ledger.manifest().segments) <= 3
    assert [one.name for one in ledger.rows()] == sorted(model)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_compaction_that_dies_at_any_write_loses_and_doubles_nothing(tmp_path: Path, step: int) -> None:
    class Dying(Store):
        left = 99

        def count(self) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def put_file(self, name: str, source: Path) -> None:
            super().put_file(name, source)
            self.count()

        def create(self, name: str, data: bytes) -> bool:
            done = super().create(name, data)
            self.count()
            return done

        def replace_if(self, name: str, data: bytes, etag: str) -> str | None:
            done = super().replace_if(name, data, etag)
            self.count()
            return done

        def delete(self, names: object) -> None:
            self.count()
            super().delete(names)  # type: ignore[arg-type]

    store = Dying(str(tmp_path))
    ledger = Ledger(store)
    commit(ledger, "u1", row("a.jpg"), row("b.jpg"))
    ledger.compact(merge=True)
    commit(ledger, "u2", row("a.jpg", "2", 2))
    commit(ledger, "u3", row("c.jpg"))
    expected = [("a.jpg", "2", 2), ("b.jpg", "1", 1), ("c.jpg", "1", 1)]
    store.left = step
    try:
        ledger.compact(merge=True)
    except KeyboardInterrupt:
        assert list(Ledger(Store(str(tmp_path))).known()) == expected
    again = Ledger(Store(str(tmp_path)))
    again.compact(merge=True)
    assert list(again.known()) == expected
    assert [one.name for one in again.rows()] == ["a.jpg", "b.jpg", "c.jpg"]
    commit(again, "u4", row("d.jpg"))
    again.compact(merge=True)
    commit(again, "u5", row("e.jpg"))
    again.compact(merge=True)
    kept = {one.name for one in again.manifest().segments} | set(again.manifest().retired)
    there = {entry.name for entry in store.list(layout.UPLOADS_SEGMENTS)}
    assert there == {layout.upload_segment(name) for name in kept}  # nothing is left behind for ever


def test_two_who_compact_at_once_lose_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(40):
        commit(Ledger(store), f"u{number:02d}", row(f"{number:02d}.jpg"))
    refused: list[ConflictError | InputError] = []

    def compact() -> None:
        try:
            Ledger(Store(str(tmp_path))).compact(merge=True)
        except (ConflictError, InputError) as error:  # whoever is slower stops, or finds its commits gone
            refused.append(error)

    threads = [threading.Thread(target=compact) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 4
    assert [name for name, _, _ in Ledger(store).known()] == [f"{number:02d}.jpg" for number in range(40)]


def test_a_run_that_another_took_over_from_does_not_name_what_is_deleted(tmp_path: Path) -> None:
    class Slow(Store):
        """Stands still after it has written a segment, until another run has taken over and tidied up."""

        def put_file(self, name: str, source: Path) -> None:
            super().put_file(name, source)
            other = Ledger(Store(str(tmp_path)))
            for number in range(3):
                commit(other, f"v{number}", row(f"b{number}.jpg"))
                other.compact(merge=True)

    class Lost(Exception):
        pass

    def check() -> None:
        raise Lost

    commit(Ledger(Store(str(tmp_path))), "u", row("a.jpg"))
    with pytest.raises(Lost):
        Ledger(Slow(str(tmp_path))).compact(merge=False, before=check)
    assert [name for name, _, _ in Ledger(Store(str(tmp_path))).known()] == ["a.jpg", "b0.jpg", "b1.jpg", "b2.jpg"]


@pytest.mark.parametrize("taken_over", [False, True])
def test_the_manifest_is_looked_at_before_the_lease(tmp_path: Path, taken_over: bool) -> None:
    commit(Ledger(Store(str(tmp_path))), "u", row("a.jpg"))
    checks = []

    def check() -> None:
        checks.append(1)
        if taken_over and len(checks) == 1:  # after it was asked for, this run stands still
            other = Ledger(Store(str(tmp_path)))
            for number in range(3):
                commit(other, f"v{number}", row(f"b{number}.jpg"))
                other.compact(merge=True)
        elif taken_over:
            raise ConflictError("the lease is lost")

    ledger = Ledger(Store(str(tmp_path)))
    if taken_over:
        with pytest.raises(ConflictError, match="the lease is lost"):
            ledger.compact(merge=False, before=check)
    else:
        ledger.compact(merge=False, before=check)
    names = [name for name, _, _ in Ledger(Store(str(tmp_path))).known()]
    assert names == ["a.jpg", *(f"b{number}.jpg" for number in range(3 * taken_over))]


def test_the_same_unit_counts_once_and_other_bytes_are_a_conflict(store: Store) -> None:
    ledger = Ledger(store)
    commit(ledger, "u1", row("a.jpg"))
    commit(ledger, "u1", row("a.jpg"))
    with pytest.raises(ConflictError, match=r"a\.jpg: committed with SHA-256 abab.*, produced here with cdcd"):
        commit(ledger, "u1", row("a.jpg", output_sha256="cd" * 32))
    assert len(list(ledger.rows())) == 1


def test_segments_are_read_in_blocks(tmp_path: Path) -> None:
    rows = (values_of(row(f"{number:06d}.jpg")) for number in range(20_000))
    segment = write_segment(rows, tmp_path / "s", "s")
    assert (segment.rows, segment.protected) == (20_000, 20_000)
    with (tmp_path / "s").open("rb") as file:
        known = read_known(file, "segment")
        assert next(known) == ("000000.jpg", "1", 1)
        assert sum(1 for _ in known) == 19_999
