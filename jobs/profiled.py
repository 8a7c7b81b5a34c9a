"""--profile: where the time of each worker went, printed at the end of a stage and kept beside the output."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from jobs.prepare import Run
from pipeline import layout
from pipeline.profile import Profile, as_text


@contextlib.contextmanager
def profiled(run: Run, stage: str) -> Iterator[Profile]:
    """Collect the work of a stage; print and keep it if the user asked for it."""
    profile = Profile(stage, time.time())
    yield profile
    rows = profile.rows(time.time())
    if not (run.settings.profile and rows):
        return
    print(f"profile of {stage}, {rows[0]['seconds']:.1f} s\n{as_text(rows)}")
    known = run.output.read(layout.PROFILE) if run.output.info(layout.PROFILE) is not None else b"[]"
    run.output.put(layout.PROFILE, json.dumps(json.loads(known) + rows, indent=1).encode())
