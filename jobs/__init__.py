"""What people start: flags, the order of the stages, exit codes.

Imported before anything else, so that Ctrl-C while the rest is imported ends a job as it does later: see interrupted.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import ending


def interrupted(*_: Any) -> None:
    """Signal handler until a job's main begins: one line and the exit code, without a word from half an import."""
    line, code = ending(KeyboardInterrupt())
    os.write(2, f"{line}\n".encode())
    os._exit(code)


_IS_COMMAND = sys.argv[:1] == ["-m"] or Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
