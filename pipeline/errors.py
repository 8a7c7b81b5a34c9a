"""The exception hierarchy. Every message is one line: what, where, and what to do next.

ScumbleError            exit code
├── SettingsError       2   invalid settings, refused before any work
├── InputError          1   input that cannot be read, or that changed since it was planned
├── StoreError          1   the object store refused or failed; the only one that is retried
├── ClusterError        1   Ray or its machines failed: dead workers, no CPU, no response
├── ConflictError       1   records that must agree do not: digests, fingerprints, surrogates
└── PromiseError        1   an internal guarantee does not hold: a bound or a count

SampleError             never leaves the shard: it becomes a Rejection
"""

from __future__ import annotations

from enum import Enum

INTERRUPTED = 130  # exit code after Ctrl-C, as in a shell


class ScumbleError(Exception):
    """A failure that is reported as one line and ends the run with `exit_code`."""

    exit_code = 1


class SettingsError(ScumbleError):
    """The settings are invalid; nothing was started."""

    exit_code = 2


class InputError(ScumbleError):
    """The input is missing, unreadable, or has changed since it was planned."""


class StoreError(ScumbleError):
    """The store refused or failed.

    may_pass  True if retries failed, as when the store is down; False if it refused
    """

    may_pass = False


class ClusterError(ScumbleError):
    """Ray or one of its machines failed; the input is not at fault, and the same command can be run again."""


class ConflictError(ScumbleError):
    """Two records that must agree do not."""


class PromiseError(ScumbleError):
    """An internal guarantee does not hold; nothing from this shard may be published."""


def unreadable(where: str, error: object, cure: str = "restore or delete it") -> InputError:
    """The error for a file that this version would not have written; `cure` says what to do about it."""
    return InputError(f"{where} is damaged or from another version of Scumble ({one_line(error)}): {cure}")


def one_line(error: object, limit: int = 200) -> str:
    """An exception's message in one line of at most `limit` characters; its type if the message is empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def ending(error: BaseException) -> tuple[str, int]:
    """The message and exit code that a run ends with; for foreign exceptions the message names the type."""
    if isinstance(error, ScumbleError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run the same command again to resume", INTERRUPTED
    return f"{type(error).__name__}: {one_line(error)} (unexpected; --debug shows where)", ScumbleError.exit_code


class Reason(str, Enum):
    """Why a sample is in quarantine rather than in the output."""

    UNDECODABLE = "undecodable"
    EMPTY = "empty"
    ANIMATED = "animated"
    TOO_MANY_PIXELS = "too-many-pixels"
    UNSUPPORTED_FORMAT = "unsupported-format"
    NO_IMAGE = "no-image"
    SEVERAL_IMAGES = "several-images"
    UNKNOWN_SIDECAR = "unknown-sidecar"
    TOO_COSTLY = "too-costly"
    UNCHANGED = "unchanged"
    UNSAFE_NAME = "unsafe-name"
    UNUSABLE_NAME = "unusable-name"
    NOT_A_FILE = "not-a-file"
    TOO_LARGE = "too-large"
    DUPLICATE_MEMBER = "duplicate-member"
    INTERLEAVED_KEY = "interleaved-key"
    TRUNCATED_SHARD = "truncated-shard"


class SampleError(Exception):
    """A sample cannot be protected. Caught where the sample is handled and turned into a Rejection."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
