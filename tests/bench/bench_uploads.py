"""What a run over new uploads costs beside a bare listing, in memory, and until its first commit.

python tests/bench/bench_uploads.py [--objects 20000] [--rows 1000000] [--rounds 5] [--s3]

listing   20,000 objects of which 50 are new: listing and decision, beside one recursive listing that decides nothing
memory    peak of a process that lists, decides and compacts with a ledger of 10,000 rows, and of 1,000,000
start     from the start of the command to its first commit, and how many of 50 images were read by then
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ratio import in_turns, publish, row  # noqa: E402

from pipeline import layout  # noqa: E402
from pipeline.storage.listings import Entry  # noqa: E402
from pipeline.storage.store import Store  # noqa: E402
from pipeline.uploads.ledger import Ledger, UnitCommit  # noqa: E402
from pipeline.uploads.listing import Tally, changes  # noqa: E402
from pipeline.uploads.segments import Row, values_of, write_segment  # noqa: E402

NEW = 50
NEEDED = 1 / 1.5


def known_row(name: str, etag: str) -> Row:
    digest = uuid.uuid5(uuid.NAMESPACE_URL, name).hex * 2
    fields = {"output": name, "output_size": 50_000, "output_sha256": digest, "cluster": 3, "distance": 0.5}
    return Row(name, etag, 1, 40_000, "image", protected=1, **fields)  # type: ignore[arg-type]


def write_ledger(output: Store, rows: Iterator[Row], counts: list[int]) -> None:
    """A ledger of ready segments, as earlier runs would have left it."""
    segments = []
    for count in counts:
        name = uuid.uuid4().hex
        with tempfile.TemporaryDirectory() as scratch:
            part = (values_of(next(rows)) for _ in range(count))
            segments.append(vars(write_segment(part, Path(scratch) / "s", name)))
            output.put_file(layout.upload_segment(name), Path(scratch) / "s")
    manifest = {"format": 1, "segments": segments, "retired": []}
    output.put(layout.UPLOADS_LEDGER, json.dumps(manifest).encode())


def decide(source: Store, output: Store) -> Tally:
    tally = Tally()
    entries, known, now = source.walk(), Ledger(output).known(), source.clock()
    new = list(changes(entries, known, now=now, settle_s=0, fault=lambda name: None, tally=tally))
    assert len(new) == NEW, len(new)
    return tally


def bare_folder(root: str) -> int:
    """Name, size and time of every file below a folder."""
    found = []
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    seen = entry.stat(follow_symlinks=False)
                    found.append((entry.path, seen.st_size, seen.st_mtime))
    return len(found)


def bare_bucket(store: Store) -> int:
    """All pages of the same prefix through the same client."""
    bucket, _, prefix = store.root.partition("/")
    token: dict[str, str] = {}
    count = 0
    while True:
        page = store.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", **token)
        count += len(page["Contents"])
        if not page["IsTruncated"]:
            return count
        token = {"ContinuationToken": page["NextContinuationToken"]}


def listing(folder: Path, objects: int, rounds: int, s3: str | None, s3_objects: int) -> list[Any]:
    source, output = Store(str(folder / "in")), Store(str(folder / "out"))
    for number in range(objects):
        path = folder / "in" / f"user {number % 100:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number % 100))
        os.utime(path, (1e9, 1e9))
    prepared(source, output, objects)
    taken = in_turns(lambda n: decide(source, output).listed, lambda n: bare_folder(source.root), rounds)
    rows = [row("folder: list and decide, beside scandir, stat", "objects", taken, NEEDED)]
    if s3 is not None:
        remote, remote_output = Store(f"{s3}/in"), Store(f"{s3}/out")
        for start in range(0, s3_objects, 500):
            numbers = range(start, min(start + 500, s3_objects))
            names = [f"user {number % 100:02d}/{number:06d}.jpg" for number in numbers]
            remote.filesystem.pipe({remote.path(name): b"x" for name in names})
        prepared(remote, remote_output, s3_objects)
        taken = in_turns(lambda n: decide(remote, remote_output).listed, lambda n: bare_bucket(remote), rounds)
        rows.append(row(f"bucket, {s3_objects:,}: list and decide, beside all pages", "objects", taken, NEEDED))
    return rows


def prepared(source: Store, output: Store, objects: int) -> None:
    """The ledger of all but 50 objects."""
    every = objects // NEW
    rows = (known_row(e.name, e.etag) for number, e in enumerate(source.walk()) if number % every)
    write_ledger(output, rows, [objects - NEW])


def memory_of(rows: int) -> dict[str, float]:
    """Peak of a fresh process, MB, and its seconds."""
    command = [sys.executable, __file__, "--child", str(rows)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"seconds": round(time.perf_counter() - started, 1)}


def child(rows: int) -> None:
    """List, decide and compact with a ledger of two like segments, which are merged into one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Store(folder)
        names = (f"user {number // 1000:04d}/{number:012d}.jpg" for number in range(rows))
        write_ledger(output, (known_row(name, "e" * 32) for name in names), [rows // 2, rows - rows // 2])
        base = peak_mb()
        ledger = Ledger(output)
        ledger.compact(merge=True)
        assert [one.rows for one in ledger.manifest().segments] == [rows]
        new = tuple(known_row(f"user 0000/new {number:02d}.jpg", "e") for number in range(NEW))
        ledger.commit(UnitCommit("unit", "f", new))
        entries = (Entry(name, 1, "e" * 32, 1.0) for name, _, _ in Ledger(output).known() if "new" not in name)
        tally = Tally()
        items = changes(entries, ledger.known(), now=1e9, settle_s=0, fault=lambda name: None, tally=tally)
        assert sum(1 for _ in items) == 0
        assert (tally.known, tally.deleted) == (rows, NEW)
        ledger.compact(merge=True)
    print(json.dumps({"rows": rows, "peak_mb": peak_mb(), "peak_while_written_mb": base}))


def peak_mb() -> float:
    """Of this program; what getrusage says includes the one that it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)


def start(folder: Path) -> dict[str, float]:
    """Seconds from the start of the command to its first commit."""
    import numpy as np

    from tests.support.samples import image_bytes
    from tests.support.uploads import patch, protection_of

    (folder / "uploads").mkdir()
    for number in range(NEW):
        pixels = np.tile(patch(number), (6, 8, 1))[:375, :500]
        (folder / "uploads" / f"{number:02d}.jpg").write_bytes(image_bytes(pixels, "JPEG", quality=90))
        os.utime(folder / "uploads" / f"{number:02d}.jpg", (1e9, 1e9))
    (folder / "p.safetensors").write_bytes(protection_of(None).to_bytes())
    command = [sys.executable, str(ROOT / "jobs/protect_uploads.py"), "--input", str(folder / "uploads")]
    command += ["--output", str(folder / "safe"), "--protection", str(folder / "p.safetensors"), "--max-drift", "1"]
    started = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    commits = folder / "safe" / layout.UPLOADS_COMMITS
    while not (commits.is_dir() and any(commits.iterdir())):
        assert run.poll() is None, run.returncode
        time.sleep(0.005)
    first = time.perf_counter() - started
    written = len(list((folder / "safe").glob("*.jpg")))
    assert run.wait() == 0
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = time.perf_counter() - started
    cpu = round(usage.ru_utime + usage.ru_stime, 2)
    seconds = {"first_commit_s": round(first, 2), "whole_run_s": round(whole, 2), "cpu_s": cpu}
    return seconds | {"images_written_by_then": written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", metavar="URL", help="prefix in a bucket that may be written to, for a listing there")
    parser.add_argument("--s3-objects", type=int, default=20_000)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = start(Path(folder))
        rows = listing(Path(folder), options.objects, options.rounds, options.s3, options.s3_objects)
    few, many = memory_of(10_000), memory_of(options.rows)
    publish("uploads", rows, {"start": begun, "memory": [few, many]})
    print(f"start to first commit: {begun['first_commit_s']} s, at most 10 s on 2 idle cores: {begun}")
    print(f"peak memory: {many['peak_mb'] / few['peak_mb']:.2f} times as much for {many} as for {few}")


if __name__ == "__main__":
    main()
