"""Labels and classes that lie beside a collection: CSV, JSON lines, lists of classes, ImageNet's own files."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError, SettingsError, one_line
from pipeline.packing.items import path_fault
from pipeline.records import shown
from pipeline.settings import near_matches
from pipeline.storage.store import file_at

_PATHS, _LABELS = ("path", "file_name", "filename", "file"), ("label", "class", "class_name")
_MAX_MATLAB_BYTES = 1 << 24  # the published meta.mat has 400 kB
_MAX_LABEL = 1_000_000


@dataclass(frozen=True)
class LabelTable:
    """Labels by path, from a file.

    classes  None if the labels are names, which are numbered in sorted order; labels that are numbers stay as they are
    """

    class_names: Mapping[str, str]
    classes: tuple[str, ...] | None


def read_labels(url: str) -> LabelTable:
    """A CSV with a header, or JSON lines, with a path and a label in each row.

    Raises InputError, naming the line, for a row without them, a path that leaves the collection, and a path that
    occurs twice.
    """
    store, name = file_at(url)
    text = _decoded(store.read(name), url)
    rows = _json_rows(text, url) if name.lower().endswith((".jsonl", ".ndjson", ".json")) else _csv_rows(text, url)
    found: dict[str, str] = {}
    numbers = True
    for line, path, label in rows:
        path = path.removeprefix("./")
        fault = path_fault(path)
        if fault is not None:
            raise InputError(f"{url}, line {line}: {path!r}: {fault[1]}; paths are relative to --input")
        if path in found:
            raise InputError(f"{url}, line {line}: {path} occurs twice")
        numbers = numbers and re.fullmatch("0|[1-9][0-9]{0,8}", label) is not None
        found[path] = shown(label)
    if not found:
        raise InputError(f"{url}: no rows")
    return LabelTable(found, numbered(map(int, found.values()), url) if numbers else None)


def numbered(labels: Iterator[int], where: str) -> tuple[str, ...]:
    """Class names for labels that are numbers: the numbers. Raises InputError for negative or huge ones."""
    seen = set(labels)
    if seen and (min(seen) < 0 or max(seen) > _MAX_LABEL):
        raise InputError(f"{where}: labels must lie between 0 and {_MAX_LABEL:,}, not {min(seen):,} to {max(seen):,}")
    return tuple(map(str, range(max(seen, default=-1) + 1)))


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; save it as UTF-8") from None


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [(column or "").strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        named = [next((column for column in columns if column in known), None) for known in (_PATHS, _LABELS)]
        if named[0] is None or named[1] is None:
            raise InputError(f"{where}: its first line must name the columns, such as path,label")
        for row in reader:
            path, label = row[named[0]], row[named[1]]
            if not path or not label:
                raise InputError(f"{where}, line {reader.line_num}: a path and a label are needed")
            yield reader.line_num, path, label.strip()
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: {one_line(error)}") from None


def _json_rows(text: str, where: str) -> Iterator[tuple[int, str, str]]:
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            value: Any = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}, line {line}: not JSON ({one_line(error, 80)})") from None
        fields = value if isinstance(value, dict) else {}
        path = next((fields[name] for name in _PATHS if name in fields), None)
        label = next((fields[name] for name in _LABELS if name in fields), None)
        if not isinstance(path, str) or not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            raise InputError(f'{where}, line {line}: expected {{"path": …, "label": …}}')
        yield line, path, str(label)


def read_classes(url: str, known: Sequence[str]) -> list[str]:
    """The classes that a file lists, one a line, by name or by the first word of the line.

    known  class names of the collection
    Raises SettingsError for one that the collection lacks, with near matches, or that is listed twice.
    """
    store, name = file_at(url)
    chosen, there = list[str](), set(known)
    for number, line in enumerate(_decoded(store.read(name), url).split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        one = line if line in there else line.split()[0].rstrip(",")
        if one not in there:
            near = near_matches(one, list(known))
            raise SettingsError(f"--classes {url}, line {number}: no class {one!r} in the input{near}")
        if one in chosen:
            raise SettingsError(f"--classes {url}, line {number}: {one} is listed twice")
        chosen.append(one)
    if not chosen:
        raise SettingsError(f"--classes {url}: lists no class")
    return chosen


def read_ground_truth(truth: str, synsets: str | None) -> list[str]:
    """The class, a WordNet id, of every validation image of ImageNet, in the order of their names.

    truth    one line per image: a WordNet id, or the number that the development kit gives to a synset
    synsets  for numbers: the kit's meta.mat, or a text with the synset of number n in line n
    Raises InputError for anything else, and for a list of synsets in alphabetical order, which the numbers do not mean.
    """
    store, name = file_at(truth)
    lines = [line.split() for line in _decoded(store.read(name), truth).split("\n") if line.strip()]
    words = [line[-1] for line in lines]
    if all(re.fullmatch(r"n\d{8}", word) for word in words):
        return words
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words):
        raise InputError(f"{truth}: expected a synset's number or its WordNet id in each line")
    if synsets is None:
        raise SettingsError("--ground-truth has numbers: add --synsets FILE, the meta.mat of the development kit")
    ids = _synset_ids(synsets)
    if len(ids) > 1 and ids == sorted(ids):
        raise InputError(
            f"{synsets} is in alphabetical order, but the numbers of {truth} follow the development kit: "
            "use its meta.mat as --synsets"
        )
    highest = max(map(int, words), default=0)
    if highest > len(ids):
        raise InputError(f"{truth} has number {highest}, but {synsets} only {len(ids)} synsets")
    return [ids[int(word) - 1] for word in words]


def _synset_ids(url: str) -> list[str]:
    store, name = file_at(url)
    data = store.read(name)
    if name.lower().endswith(".mat"):
        ids = _matlab_synsets(data, url)
    else:
        ids = [line.split()[0] for line in _decoded(data, url).split("\n") if line.strip()]
    if not ids or not all(re.fullmatch(r"n\d{8}", one) for one in ids):
        raise InputError(f"{url}: expected a WordNet id, such as n01440764, at the start of each line")
    return ids


def _matlab_synsets(data: bytes, where: str) -> list[str]:
    """WordNet ids by ILSVRC2012_ID, from 1 on without gaps; those above the leaves of the hierarchy are left out."""
    import scipy.io

    if len(data) > _MAX_MATLAB_BYTES:
        raise InputError(f"{where}: {len(data):,} bytes are too many for the kit's meta.mat")
    try:
        rows = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        pairs = {
            int(number): str(wnid)
            for number, wnid, children in zip(rows["ILSVRC2012_ID"], rows["WNID"], rows["num_children"], strict=True)
            if int(children) == 0
        }
    except (
        *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError),
        *(NotImplementedError, zlib.error, scipy.io.matlab.MatReadError),
    ) as error:
        raise InputError(f"{where}: not the kit's meta.mat ({one_line(error, 80)})") from None
    if sorted(pairs) != list(range(1, len(pairs) + 1)):
        raise InputError(f"{where}: its synsets are not numbered from 1 on")
    return [pairs[number] for number in sorted(pairs)]
