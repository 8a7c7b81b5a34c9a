"""Whose output this is: the input, the protection and the settings that made it; no other may go on in it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import layout
from pipeline.errors import ConflictError, InputError
from pipeline.fingerprint import FORMAT_VERSION, canonical, sha256
from pipeline.json_record import JsonRecord
from pipeline.layout import RUN_FOLDER
from pipeline.storage.store import Store


@dataclass(frozen=True)
class Origin(JsonRecord):
    """run.json of an output of uploads; credentials and keys are not in it."""

    input: str  # root of the store
    protection_sha256: str
    epsilon: float
    settings: Mapping[str, Any]  # that decide bytes
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the bytes of every object, but for the versions of libraries: they may be updated."""
        return sha256(canonical({name: value for name, value in self.to_json().items() if name != "input"}))


def check_origin(output: Store, origin: Origin) -> bool:
    """True if the output is of this origin, False if it is empty.

    Raises ConflictError, naming what differs, if it is another's, or if somebody else has written there.
    """
    seen = Origin.read(output, layout.UPLOADS_ORIGIN)
    if seen is None:
        _check_empty(output)
        return False
    theirs, ours = seen.to_json(), origin.to_json()
    for name in ours:
        if theirs[name] != ours[name]:
            raise ConflictError(
                f"{output.url} was made with another {name} ({_short(theirs[name])}, now {_short(ours[name])}): "
                f"use that one, or another --output; if an input has only moved, correct {layout.UPLOADS_ORIGIN}"
            )
    return True


def claim(output: Store, origin: Origin) -> None:
    """Write whose output this is. Raises ConflictError if somebody else was faster."""
    if not output.create(layout.UPLOADS_ORIGIN, origin.to_bytes()):
        check_origin(output, origin)


def honours_conditions(output: Store) -> bool:
    """True if the store refuses to replace another version of an object, and to create one that is there."""
    name = f"{RUN_FOLDER}/probe-{uuid.uuid4().hex}"
    first = output.create(name, b"1")  # where that fails, there is nothing to delete
    try:
        return first and not output.create(name, b"2") and output.replace_if(name, b"3", "0" * 32) is None
    finally:
        output.delete([name])


def _check_empty(output: Store) -> None:
    try:
        stranger = next((entry.name for entry in output.walk() if _is_strange(entry.name)), None)
    except InputError:
        return  # there is no such folder yet
    if stranger is not None:
        raise ConflictError(f"{output.url} holds {stranger}, which no run over uploads wrote: choose another --output")


def _is_strange(name: str) -> bool:
    return not name.startswith((f"{layout.UPLOADS}/", f"{RUN_FOLDER}/scratch/", f"{RUN_FOLDER}/probe-"))


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
