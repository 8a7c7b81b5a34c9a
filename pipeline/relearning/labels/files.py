"""What labellings read from files, on the machine that starts an evaluation: others may not have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import InputError, SettingsError, one_line
from pipeline.relearning.labels.labellings import read_superclasses
from pipeline.relearning.labels.names import parse_labelling
from pipeline.surrogates.concepts import ConceptBank, read_bank


@dataclass(frozen=True, eq=False)
class LabelFiles:
    """The contents of the files.

    class_names   of classes 0, 1, …; None if there is no file
    bank          embeddings of the class names; None: ImageNet's classes
    superclasses  labelling -> class (name or index) -> superclass
    """

    class_names: tuple[str, ...] | None = None
    bank: ConceptBank | None = None
    superclasses: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_label_files(labellings: Sequence[str], classes: str | None, concepts: str | None) -> LabelFiles:
    """Read what the labellings need.

    classes   path of a file with one class name per line
    concepts  path of a concept bank
    Raises SettingsError if a labelling needs class names and there are none, InputError for a file that cannot be read.
    """
    kinds = {name: parse_labelling(name) for name in labellings}
    needing = [name for name, (kind, _) in kinds.items() if kind == "concepts"]
    if needing and classes is None:
        raise SettingsError(f"labelling {needing[0]} needs the class names: add --classes FILE, one name per line")
    return LabelFiles(
        class_names=_lines(Path(classes)) if classes is not None else None,
        bank=read_bank(Path(concepts)) if concepts is not None else None,
        superclasses={
            name: read_superclasses(Path(argument))
            for name, (kind, argument) in kinds.items()
            if kind == "superclasses"
        },
    )


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        why = one_line(getattr(error, "strerror", None) or error, 120)
        raise InputError(f"--classes {path} cannot be read as text, UTF-8 ({why})") from None
    return tuple(line.strip() for line in lines if line.strip())
