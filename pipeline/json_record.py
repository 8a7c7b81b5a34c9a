"""A frozen dataclass that is one JSON file: the same record writes it, reads it, and refuses what it is not."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import InputError, one_line

if TYPE_CHECKING:
    from pipeline.store import Store

_R = TypeVar("_R", bound="JsonRecord")


class JsonRecord:
    """Fields are str, int, float, bool, None, Any, tuples of one type, mappings of names, and dataclasses of these."""

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
            raise InputError(
                f"{where} is damaged, or of another version of Scumble ({one_line(error)}): restore or remove it"
            ) from None

    @classmethod
    def read(cls: type[_R], store: Store, name: str) -> _R | None:
        """The record in a store; None if there is none. Raises InputError as from_bytes."""
        data = store.read_if_there(name)
        return None if data is None else cls.from_bytes(data, f"{store.url}/{name}")


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
        return {name: _made(get_args(hint)[1], one, f"{path}.{name}") for name, one in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{path.lstrip('.') or 'it'} is {one_line(json.dumps(value), 40)}")
    return value


def _record(kind: Any, value: Mapping[str, Any], path: str) -> Any:
    hints, known = get_type_hints(kind), {one.name: one for one in fields(kind)}
    for name in value:
        if name not in known:
            raise ValueError(f"{path}.{name} is unknown".lstrip("."))
    for name, one in known.items():
        if name not in value and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{path}.{name} is missing".lstrip("."))
    return kind(**{name: _made(hints[name], one, f"{path}.{name}") for name, one in value.items()})
