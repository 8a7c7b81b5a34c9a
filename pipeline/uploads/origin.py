"""The origin of an output: its input, protection and settings; a run with a different origin may not continue in it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import layout
from pipeline.errors import ConflictError, InputError
from pipeline.hashing import FORMAT_VERSION, canonical, sha256
from pipeline.json_record import JsonRecord
from pipeline.layout import RUN_FOLDER
from pipeline.storage.store import Store


@dataclass(frozen=True)
class Origin(JsonRecord):
    """run.json of an uploads output; contains no credentials or keys."""

    input: str  # root of the store
    protection_sha256: str
    epsilon: float
    settings: Mapping[str, Any]  # those that decide output bytes
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the bytes of every object, except library versions, which may be updated."""
        return sha256(canonical({name: value for name, value in self.to_json().items() if name != "input"}))


def check_origin(output: Store, origin: Origin) -> bool:
    """True if the output has this origin, False if it is empty.

    Raises ConflictError, naming the difference, if it has another origin or holds anything else.
    """
    seen = Origin.read(output, layout.UPLOADS_ORIGIN)
    if seen is None:
        _check_empty(output)
        return False
    theirs, ours = seen.to_json(), origin.to_json()
    if theirs["format_version"] != ours["format_version"]:
        raise ConflictError(
            f"{output.url} was made by another version of Scumble, whose deltas differ: use that version, "
            "or another --output"
        )
    for name in ours:
        if theirs[name] != ours[name]:
            moved = f"; if the input has merely moved, edit {layout.UPLOADS_ORIGIN}" if name == "input" else ""
            raise ConflictError(
                f"{output.url} was made with a different {name} ({_short(theirs[name])}, now {_short(ours[name])}): "
                f"use that one or another --output{moved}"
            )
    return True


def claim(output: Store, origin: Origin) -> None:
    """Record the origin of an output. Raises ConflictError if another run claimed it first."""
    if not output.create(layout.UPLOADS_ORIGIN, origin.to_bytes()):
        check_origin(output, origin)


def honours_conditions(output: Store) -> bool:
    """True if the store refuses to replace a version that has changed, and to create an object that exists."""
    name = f"{RUN_FOLDER}/probe-{uuid.uuid4().hex}"
    first = output.create(name, b"1")  # if this fails, there is nothing to delete
    try:
        return first and not output.create(name, b"2") and output.replace_if(name, b"3", "0" * 32) is None
    finally:
        output.delete([name])


def _check_empty(output: Store) -> None:
    try:
        stranger = next((entry.name for entry in output.walk() if _is_strange(entry.name)), None)
    except InputError:
        return  # the folder does not exist yet
    if stranger is not None:
        raise ConflictError(
            f"{output.url} contains {stranger}, which was not written by an uploads run: choose another --output"
        )


def _is_strange(name: str) -> bool:
    return not name.startswith((f"{layout.UPLOADS}/", f"{RUN_FOLDER}/scratch/", f"{RUN_FOLDER}/probe-"))


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
