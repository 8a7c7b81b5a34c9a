"""status.json: the state of a run, for machines; the exit code of a job submission cannot be trusted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline import layout
from pipeline.errors import ScumbleError, ending
from pipeline.runs.run_record import RunStatus
from pipeline.storage.store import Store


class StatusFile:
    """Writes state, stage, seconds per stage and counts into the output whenever they change."""

    def __init__(self, output: Store, fingerprint: str) -> None:
        self._output = output
        before = RunStatus.read(output, layout.STATUS)
        seconds = before.stage_seconds if before is not None else {}
        self._status = RunStatus(fingerprint, started=_now(), stage_seconds=seconds)

    def write(self, state: str, **fields: Any) -> None:
        """Write the state, and other fields of RunStatus."""
        self._status = replace(self._status, state=state, updated=_now(), **fields)
        self._output.put(layout.STATUS, self._status.to_bytes())

    def write_if_possible(self, state: str, **fields: Any) -> None:
        """Like `write`, but silent if that fails: the failure before it is the one to report."""
        with contextlib.suppress(ScumbleError):
            self.write(state, **fields)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the run, timed."""
        self.write("running", stage=name)
        started = time.monotonic()
        yield
        seconds = self._status.stage_seconds
        spent = round(seconds.get(name, 0.0) + time.monotonic() - started, 2)
        self._status = replace(self._status, stage_seconds={**seconds, name: spent})


@contextlib.contextmanager
def reported(output: Store, fingerprint: str) -> Iterator[StatusFile]:
    """A status file that ends as `failed`, with the error line, if the run fails."""
    status = StatusFile(output, fingerprint)
    try:
        yield status
    except BaseException as error:  # whatever it was, the file must not keep saying "running"
        message, code = ending(error)
        status.write_if_possible("failed", message=message, exit_code=code)
        raise


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
