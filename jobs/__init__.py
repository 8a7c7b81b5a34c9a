"""What people start: flags, the order of the stages, exit codes.

Imported before anything else, so that Ctrl-C while the rest is imported ends a job as it does later: see interrupted.
A job imports its steps, which takes seconds, only once its options are read: see importing.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ending


def interrupted(*_: Any) -> None:
    """Signal handler of a job that still imports: one line and the exit code, without a word from half an import."""
    line, code = ending(KeyboardInterrupt())
    os.write(2, f"{line}\n".encode())
    os._exit(code)


_IS_COMMAND = sys.argv[:1] == ["-m"] or Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the imports of a job's steps: Ctrl-C among them ends a command as `interrupted` says."""
    is_ours = _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
