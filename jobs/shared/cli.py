"""What all jobs share at the command line: parsing, settings files, the one-line error, the exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs import interrupted
from jobs.shared.commands import called_as
from pipeline.errors import SettingsError, ending, one_line
from pipeline.quantities import parse_bytes, parse_epsilon, parse_seconds
from pipeline.settings import near_matches

if TYPE_CHECKING:
    from pipeline.shards.squares import LeftOut

DONE, FAILED, USAGE, QUARANTINED = 0, 1, 2, 3
LEAST_KEY_BYTES = 16
_SHOWN = 5
_UNITS = ((30, "G"), (20, "M"), (10, "k"), (0, ""))
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "parse_seconds": "a time such as 30s, 5m or 1h",
    "parse_bytes": "a size such as 64M or 1G",
    "parse_epsilon": "a change of a pixel such as 8/255",
    "pixels": "a change of a pixel such as 8/255",
    "image_count": "a number, or all",
    "named_urls": "NAME=URL",
    "two_urls": "OTHER=THEIRS",
}
_LOG = logging.getLogger("scumble")  # says what takes long; at DEBUG, with --debug, it shows tracebacks


class Parser(argparse.ArgumentParser):
    """argparse that keeps the layout of its texts, shows every default, and suggests near matches.

    defaults  option -> its default, for help alone; of an option that is missing here, the argument's own default
    """

    def __init__(self, *, defaults: Mapping[str, Any] | None = None, **options: Any) -> None:
        formatter = partial(_Formatter, defaults=defaults or {})
        texts = ("prog", "usage", "description", "epilog")
        options |= {name: called_as(options[name]) for name in texts if options.get(name)}
        super().__init__(formatter_class=formatter, allow_abbrev=False, add_help=True, **options)

    def error(self, message: str) -> Any:
        raise SettingsError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # set by the shell, which runs the command to learn how a line may go on
            import_module("argcomplete").autocomplete(self)
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise SettingsError(f"unknown option {unknown[0]}{near_matches(unknown[0], flags)} (see --help)")
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            expected = _EXPECTED.get(getattr(action.type, "__name__", ""))
            if expected is None:
                raise
            raise argparse.ArgumentError(action, f"{arg_string!r} is not {expected}") from None


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Appends its default to the help of each option, as a user would type it."""

    def __init__(self, *given: Any, defaults: Mapping[str, Any], **options: Any) -> None:
        super().__init__(*given, **options)
        self._defaults = defaults

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = _as_typed(action, self._defaults.get(action.dest, action.default))
        return f"{action.help} (default: {text})" if text else action.help


def _as_typed(action: argparse.Action, value: Any) -> str:
    """A default as a user would type it; "" where there is nothing to type."""
    if value in (None, argparse.SUPPRESS, ()) or isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if action.type is parse_epsilon:
        return f"{value * 255:g}/255"
    if action.type is parse_seconds:
        return f"{value:g}s"
    if action.type is parse_bytes:
        return next(f"{value >> bits}{unit}" for bits, unit in _UNITS if value % (1 << bits) == 0)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """The default of every field of a settings class that has one."""
    return {each.name: each.default for each in fields(kind) if each.default is not MISSING}


def given_options(parser: Parser, argv: list[str] | None) -> dict[str, Any]:
    """Options of the command line over those of --config FILE; only those that were given."""
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    config = given.pop("config", None)
    return (read_config(Path(config), parser) if config else {}) | given


def read_key(path: str | None) -> bytes | None:
    """The secret of --key-file. Raises SettingsError if it cannot be read or is too short to be one."""
    if path is None:
        return None
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"--key-file {path}: {error.strerror}") from None
    if len(key) < LEAST_KEY_BYTES:
        raise SettingsError(f"--key-file {path}: only {len(key)} bytes; a secret needs at least {LEAST_KEY_BYTES}")
    return key


def warn(text: str) -> None:
    """One line on stderr that the user must see; the run continues."""
    print(f"warning: {text}", file=sys.stderr)


def print_losses(lost: Sequence[str], place: str) -> None:
    """Warn about the first parts of an input that were not read.

    place  where all of them are listed
    """
    for line in lost[:_SHOWN]:
        warn(f"not in the output: {line}")
    if len(lost) > _SHOWN:
        warn(f"{len(lost):,} such places in total; see {place}")


def print_left_out(left: Sequence[LeftOut]) -> int:
    """Warn about samples that could not be read; returns how many."""
    total = sum(group.count for group in left)
    for group in left[:_SHOWN]:
        warn(group.said)
    if len(left) > _SHOWN:
        warn(f"{total:,} samples in {len(left):,} shards were not read")
    return total


def read_config(path: Path, parser: Parser) -> dict[str, Any]:
    """A YAML file of `option: value`, checked against the parser's own options and their types.

    `debug: true` takes effect here.
    Raises SettingsError for a missing file, an unknown key (with near matches) or a value that does not fit.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError:
        raise SettingsError(f"--config {path}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, the 13th month, "[[[[…"
        raise SettingsError(f"--config {path}: not YAML ({one_line(error, 120)})") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: expected lines of `option: value`")
    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise SettingsError(f"--config {path}: unknown option {key!r}{near_matches(name, list(actions))}")
        if value is not None:
            values[name] = _checked(path, actions[name], value)
    if values.get("debug"):
        _LOG.setLevel(logging.DEBUG)
    return values


def _joined(value: Any) -> Any:
    """A list, joined as a flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _checked(path: Path, action: argparse.Action, value: Any) -> Any:
    """One value of a settings file, by the rules of its flag; lists and mappings where the flag takes several."""
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise SettingsError(f"--config {path}: {action.dest} must be true or false, not {value!r}")
        return value or None
    if isinstance(value, dict):
        value = [f"{name}={_joined(each)}" for name, each in value.items()]
    if action.nargs == "+":
        return [_converted(path, action, item) for item in (value if isinstance(value, list) else [value])]
    converted = _converted(path, action, _joined(value))
    if action.choices is not None and converted not in action.choices:
        raise SettingsError(
            f"--config {path}: {action.dest} {value!r} is none of {', '.join(map(str, action.choices))}"
        )
    return converted


def _converted(path: Path, action: argparse.Action, value: Any) -> Any:
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    try:
        return convert(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise SettingsError(f"--config {path}: {action.dest}: invalid value {value!r}") from None


def run(main: Callable[[list[str] | None], int]) -> int:
    """Run a job's main; a failure becomes one line on stderr and an exit code, with a traceback only with --debug."""
    log = logging.StreamHandler()
    log.setFormatter(_WithoutTraceback("%(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    _LOG.setLevel(logging.DEBUG if "--debug" in sys.argv else logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # of a scheduler, an evicting node, `ray job stop`
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.excepthook = lambda failed: _told(failed.exc_value or failed.exc_type())
    sys.unraisablehook = lambda failed: _LOG.debug("%s", failed.err_msg or "ignored", exc_info=failed.exc_value)
    try:
        code = main(None)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        return _told(error)


class _WithoutTraceback(logging.Formatter):
    """What libraries log, in one line; their tracebacks only with --debug."""

    def format(self, record: logging.LogRecord) -> str:
        if _LOG.isEnabledFor(logging.DEBUG) or not record.exc_info:
            return super().format(record)
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
        return f"{super().format(plain)}: {one_line(str(record.exc_info[1]))}"


def _told(error: BaseException) -> int:
    """Print the error line; returns its exit code."""
    line, code = ending(error)
    _LOG.debug("", exc_info=error)
    print(line if isinstance(error, KeyboardInterrupt) else f"error: {line}", file=sys.stderr)
    return code
