"""What people start: flags, the order of the stages, exit codes.

Imported before anything else, so that Ctrl-C during the other imports ends a job as cleanly as later: see interrupted.
A job imports its steps, which takes seconds, only after parsing its options: see importing.
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
    """Signal handler while a job imports: prints one line and exits, without noise from a half-finished import."""
    line, code = ending(KeyboardInterrupt())
    os.write(2, f"{line}\n".encode())
    os._exit(code)


_STARTED = Path(sys.argv[0])
_IS_COMMAND = (
    sys.argv[:1] == ["-m"] or _STARTED.stem == "scumble" or _STARTED.resolve().parent == Path(__file__).resolve().parent
)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Wrap the imports of a job's steps, so that Ctrl-C during them ends the command as `interrupted` says."""
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
