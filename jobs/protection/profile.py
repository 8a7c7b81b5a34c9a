"""--profile: where each worker spent its time, printed at the end of a stage and kept in the output."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from jobs.protection.prepare import Run
from pipeline import layout
from pipeline.profile import Profile, ProfileRecord, as_text


@contextlib.contextmanager
def profiled(run: Run, stage: str) -> Iterator[Profile]:
    """Collect the work of a stage; print and keep it with --profile."""
    profile = Profile(stage, time.time())
    yield profile
    workers = profile.workers(time.time())
    if not (run.settings.profile and workers):
        return
    print(f"profile of {stage}, {workers[0].seconds:.1f} s\n{as_text(workers)}")
    known = ProfileRecord.read(run.output, layout.PROFILE) or ProfileRecord()
    run.output.put(layout.PROFILE, ProfileRecord((*known.workers, *workers)).to_bytes())
