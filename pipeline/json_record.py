"""Frozen dataclasses stored as JSON files: a record writes itself, reads itself, and rejects anything else."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import one_line, unreadable
from pipeline.hashing import canonical

_R = TypeVar("_R", bound="JsonRecord")


class Files(Protocol):
    """What is needed from a `Store` to read records."""

    @property
    def url(self) -> str: ...
    def read(self, name: str) -> bytes: ...
    def read_if_there(self, name: str) -> bytes | None: ...


class JsonRecord:
    """Fields may be str, int, float, bool, Enum, None, Any, tuples of one type, mappings by name, or dataclasses."""

    cure: ClassVar[str] = "restore or delete it"  # what to do about a rejected file

    def to_json(self) -> dict[str, Any]:
        """As plain dicts, lists and values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls: type[_R], value: Any) -> _R:
        """The inverse of to_json. Raises ValueError for a field that is unknown, missing or of the wrong type."""
        made: _R = _made(cls, value, "")
        return made

    def to_bytes(self) -> bytes:
        """The file contents; equal records give equal bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls: type[_R], data: bytes, where: str) -> _R:
        """The inverse of to_bytes. Raises InputError for anything this version would not have written."""
        try:
            return cls.from_json(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise unreadable(where, error, cls.cure) from None

    @classmethod
    def read(cls: type[_R], store: Files, name: str) -> _R | None:
        """The record in a store; None if there is none. Raises InputError like from_bytes."""
        data = store.read_if_there(name)
        return None if data is None else cls.from_bytes(data, f"{store.url}/{name}")


class CompactRecord(JsonRecord):
    """A record written without spaces: for numerous files, and for those compared byte by byte."""

    def to_bytes(self) -> bytes:
        return canonical(self.to_json())


def _made(hint: Any, value: Any, path: str) -> Any:
    """Convert a JSON value to the type `hint`. Raises ValueError, naming the path."""
    kind = get_origin(hint) or hint
    if hint is Any:
        return value
    if kind in (Union, types.UnionType):
        return None if value is None else _made(next(a for a in get_args(hint) if a is not types.NoneType), value, path)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _record(kind, value, path)
    if kind is tuple and isinstance(value, list):
        return tuple(_made(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is Mapping and isinstance(value, Mapping):
        inner = get_args(hint)[1]
        return {
            name: item if type(item) is inner else _made(inner, item, f"{path}.{name}") for name, item in value.items()
        }
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        value = next((item for item in kind if item.value == value), value)
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
            name: item if type(item) is hints[name] else _made(hints[name], item, f"{path}.{name}")
            for name, item in value.items()
        }
    )


@cache  # cached because commits have many rows
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Types by field name, and the names of fields without a default."""
    hints = get_type_hints(kind)
    needed = [column.name for column in fields(kind) if column.default is MISSING and column.default_factory is MISSING]
    return {column.name: hints[column.name] for column in fields(kind)}, needed
