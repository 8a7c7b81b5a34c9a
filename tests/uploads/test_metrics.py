"""What a run over new uploads reports, as a scrape reads it, against what lies in the output."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import protect_uploads
from pipeline.errors import PromiseError, SettingsError
from pipeline.metrics import STEPS
from pipeline.uploads.lease import take_lease
from tests.support.samples import free_port, tar_bytes
from tests.support.uploads import Job, jpeg, upload

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of the scrape itself


def scraped(text: str) -> dict[str, float]:
    """`name{label="value",…}` -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_counts_are_those_of_the_ledger_and_of_the_files(job: Job, tmp_path: Path) -> None:
    good = {f"{number}.jpg": jpeg(number) for number in range(5)}
    shard = tar_bytes([("1.jpg", jpeg(6)), ("2.jpg", b"no image")])
    upload(job.source, good | {"bad.jpg": b"no image", "some.tar": shard})
    file = tmp_path / "uploads.prom"
    assert job.run("--metrics-file", str(file)) == 0
    found = scraped(file.read_text())
    rows, outputs = job.rows(), job.outputs()

    assert found['scumble_images_total{stage="uploads"}'] == 6
    assert found['scumble_assigned_images_total{stage="uploads"}'] == 6
    assert found['scumble_quarantined_images_total{reason="unsupported-format",stage="uploads"}'] == 2
    assert found['scumble_bytes_total{direction="in",stage="uploads"}'] == sum(row.size for row in rows.values())
    assert found['scumble_bytes_total{direction="out",stage="uploads"}'] == sum(map(len, outputs.values()))
    units = Counter(name.split("{")[0] for name in found)["scumble_shards_total"]
    assert units == 1
    assert found['scumble_shards_total{stage="uploads",state="done"}'] == job.last()["units"]
    assert found['scumble_lease_held{command="protect_uploads"}'] == 0
    assert abs(found['scumble_last_success_timestamp_seconds{command="protect_uploads"}'] - time.time()) < 60
    spent = {step for step in STEPS if found.get(f'scumble_stage_seconds_total{{stage="uploads",step="{step}"}}')}
    assert spent >= {"read", "decode", "add", "encode", "put"}


def test_a_run_that_finds_the_lease_taken_says_so_and_claims_no_success(job: Job, tmp_path: Path) -> None:
    upload(job.source, {"1.jpg": jpeg(1)})
    assert job.run() == 0
    file = tmp_path / "uploads.prom"
    held = take_lease(job.output, "_scumble/uploads/lease.json", duration_s=30, wait_s=0)
    try:
        assert job.run("--metrics-file", str(file)) == 0
    finally:
        held.release()
    found = scraped(file.read_text())
    assert found == {'scumble_lease_held{command="protect_uploads"}': 1}


def test_a_bound_that_does_not_hold_is_counted_before_the_run_ends(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise PromiseError("a pixel changed by 40 levels")

    monkeypatch.setattr("pipeline.deltas.picture_deltas.close_sample", breaks)
    upload(job.source, {"1.jpg": jpeg(1)})
    file = tmp_path / "uploads.prom"
    with pytest.raises(PromiseError):
        job.run("--metrics-file", str(file))
    found = scraped(file.read_text())
    assert found['scumble_budget_violations_total{stage="uploads"}'] == 1
    assert "scumble_last_success_timestamp_seconds" not in str(found)
    assert not job.outputs()


def test_the_port_answers_while_the_job_runs_and_a_little_longer(job: Job) -> None:
    upload(job.source, {"1.jpg": jpeg(1)})
    port = free_port()
    options = ("--metrics-port", str(port), "--metrics-linger", "3")
    thread = threading.Thread(target=protect_uploads.main, args=(job.arguments(*options),))
    # signals are only taken in the main thread, which here is the scraper's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *_: None)
        thread.start()
        found: dict[str, float] = {}
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    found = scraped(answer.read().decode())
            except OSError:
                pass
            if found.get('scumble_images_total{stage="uploads"}'):
                break
            time.sleep(0.1)
        thread.join(timeout=30)
    assert found['scumble_images_total{stage="uploads"}'] == 1
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics-file", "x.prom", "--watch", "5"), "use --metrics-port"),
        (("--metrics-linger", "5"), "add --metrics-port"),
        (("--metrics-port", "0"), "--metrics-port must be at least 1"),
    ],
)
def test_metrics_that_could_not_be_seen_are_refused(job: Job, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        job.run(*options)
