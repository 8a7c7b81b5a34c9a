"""A frozen dataclass that is one JSON file: the same record writes it, reads it, and refuses what it is not."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import one_line, unreadable
from pipeline.fingerprint import canonical

_R = TypeVar("_R", bound="JsonRecord")


class Files(Protocol):
    """Where records lie: what is needed of a `Store` to read them."""

    @property
    def url(self) -> str: ...
    def read(self, name: str) -> bytes: ...
    def read_if_there(self, name: str) -> bytes | None: ...


class JsonRecord:
    """Fields are str, int, float, bool, Enum, None, Any, tuples of one type, mappings of names, other dataclasses."""

    cure: ClassVar[str] = "restore or remove it"  # what to do about a file that is refused

    def to_json(self) -> dict[str, Any]:
        """As plain objects, lists and values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls: type[_R], value: Any) -> _R:
        """The inverse of to_json. Raises ValueError for a field that is unknown, missing or of another type."""
        made: _R = _made(cls, value, "")
        return made

    def to_bytes(self) -> bytes:
        """The file; equal records give equal bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls: type[_R], data: bytes, where: str) -> _R:
        """The inverse of to_bytes. Raises InputError, one line, for what this version would not have written."""
        try:
            return cls.from_json(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise unreadable(where, error, cls.cure) from None

    @classmethod
    def read(cls: type[_R], store: Files, name: str) -> _R | None:
        """The record in a store; None if there is none. Raises InputError as from_bytes."""
        data = store.read_if_there(name)
        return None if data is None else cls.from_bytes(data, f"{store.url}/{name}")


class CompactRecord(JsonRecord):
    """The same without spaces: for files that are many, or compared by their bytes."""

    def to_bytes(self) -> bytes:
        return canonical(self.to_json())


def _made(hint: Any, value: Any, path: str) -> Any:
    """The value as `hint` says, from JSON. Raises ValueError that names the path."""
    kind = get_origin(hint) or hint
    if hint is Any:
        return value
    if kind in (Union, types.UnionType):
        return None if value is None else _made(next(a for a in get_args(hint) if a is not types.NoneType), value, path)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _record(kind, value, path)
    if kind is tuple and isinstance(value, list):
        return tuple(_made(get_args(hint)[0], one, f"{path}[{i}]") for i, one in enumerate(value))
    if kind is Mapping and isinstance(value, Mapping):
        inner = get_args(hint)[1]
        return {name: one if type(one) is inner else _made(inner, one, f"{path}.{name}") for name, one in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        value = next((one for one in kind if one.value == value), value)
    if type(value) is not kind:
        raise ValueError(f"{path.lstrip('.') or 'it'} is {one_line(json.dumps(value), 40)}")
    return value


def _record(kind: Any, value: Mapping[str, Any], path: str) -> Any:
    hints, needed = _fields(kind)
    for name in value:
        if name not in hints:
            raise ValueError(f"{path}.{name} is unknown".lstrip("."))
    for name in needed:
        if name not in value:
            raise ValueError(f"{path}.{name} is missing".lstrip("."))
    return kind(
        **{
            name: one if type(one) is hints[name] else _made(hints[name], one, f"{path}.{name}")
            for name, one in value.items()
        }
    )


@cache  # commits have many rows
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Name -> type, and the names of those without a default."""
    hints = get_type_hints(kind)
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    return {one.name: hints[one.name] for one in fields(kind)}, needed
