"""Names of labellings, kept apart so that options can be checked without heavy imports."""

from __future__ import annotations

from pipeline.errors import SettingsError
from pipeline.settings import near_matches

_FORMS = {
    "original": "original",
    "random": "random:N",
    "groups": "groups:N",
    "superclasses": "superclasses:FILE",
    "concepts": "concepts:N",
}


def parse_labelling(name: str) -> tuple[str, str]:
    """(kind, argument) of a labelling's name. Raises SettingsError, with near matches, if invalid. Reads no file."""
    kind, _, argument = name.partition(":")
    if kind not in _FORMS:
        near = near_matches(kind, list(_FORMS))
        raise SettingsError(f"unknown labelling {name!r}; choose from {', '.join(_FORMS.values())}{near}")
    form = _FORMS[kind]
    if (":" in form) != bool(argument):
        raise SettingsError(f"labelling {name!r}: write it as {form}")
    if form.endswith(":N") and (not argument.isdecimal() or int(argument) < 2):
        raise SettingsError(f"labelling {name!r}: {argument!r} is not a number of classes (2 or more)")
    return kind, argument
