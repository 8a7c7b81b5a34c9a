"""Concept banks, name -> embedding: targets for deltas, and a basis for grouping class names.

file       safetensors: embeddings [m, d]; names as a JSON list in the metadata
text       from the text tower of an open_clip model
built in   the last layer of the bundled classifier: a class's weights serve as its embedding
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.errors import InputError, SettingsError, one_line
from pipeline.hashing import derive
from pipeline.settings import EMBEDDED_SURROGATE, near_matches
from pipeline.surrogates.surrogate import Surrogate

TEMPLATE = "a photo of a {}"  # Chen et al. 2024
NAMES = Path(__file__).parent / "names"
SHIPPED = ("imagenet", "cifar100", "pets")
IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"^n\d{8}, ")


@dataclass(frozen=True, eq=False)
class ConceptBank:
    """Named embeddings.

    names       [m]; each may list several synonyms, separated by commas
    embeddings  float32 [m, d], d >= 1
    Raises InputError for mismatched shapes and non-finite embeddings.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.embeddings.shape
        if len(shape) != 2 or shape[0] != len(self.names) or not self.embeddings.size:
            raise InputError(
                f"a concept bank needs one embedding per name; it has {len(self.names)} names and embeddings {shape}"
            )
        if not np.isfinite(self.embeddings).all():
            raise InputError("a concept bank's embeddings must be finite")

    def of(self, class_names: Sequence[str]) -> NDArray[np.float32]:
        """Embedding of each class name, [k, d].

        This is the mean over all concepts with that name; failing that, with that first synonym, with that synonym, or
        with a synonym ending in it ('dog' matches 'Eskimo dog'). WordNet ids, case, hyphens, underscores are ignored.
        Raises InputError, with near matches, for names not in the bank.
        """
        tiers = self._tiers()
        embeddings, missing = [], []
        for name in class_names:
            rows = next((tier[_plain(name)] for tier in tiers if _plain(name) in tier), None)
            if rows is None:
                missing.append(name)
            else:
                embeddings.append(self.embeddings[rows].mean(axis=0))
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            near = near_matches(_plain(missing[0]), list(tiers[2]))
            raise InputError(f"{len(missing)} of {len(class_names)} classes are not in the concept bank: {shown}{near}")
        return np.stack(embeddings)

    def lacks(self, class_names: Sequence[str]) -> dict[str, str]:
        """The names that `of` would refuse, each with near matches in words, or ""."""
        tiers = self._tiers()
        known = [name for tier in tiers[1:] for name in tier]
        missing = (name for name in class_names if not any(_plain(name) in tier for tier in tiers))
        return {name: near_matches(_plain(name), known) for name in missing}

    def _tiers(self) -> tuple[dict[str, list[int]], ...]:
        """Rows by full name, by first synonym, by synonym, and by every ending of a synonym."""
        whole: dict[str, list[int]] = {}
        firsts: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        endings: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            described = _WORDNET_ID.sub("", name)
            for full in {_plain(name), _plain(described)}:
                whole.setdefault(full, []).append(row)
            firsts.setdefault(_plain(described.partition(",")[0]), []).append(row)
            parts = {_plain(part) for part in name.split(",")}
            words = [part.split() for part in parts]
            for part in parts:
                synonyms.setdefault(part, []).append(row)
            for ending in {" ".join(synonym[start:]) for synonym in words for start in range(1, len(synonym))}:
                endings.setdefault(ending, []).append(row)
        return whole, firsts, synonyms, endings


def read_bank(path: Path) -> ConceptBank:
    """Read a bank from a safetensors file. Raises InputError for any other file."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["names"])
            embeddings = np.asarray(file.get_tensor("embeddings"), dtype=np.float32)
        return ConceptBank(tuple(str(name) for name in names), embeddings)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = one_line(error, 160)
        raise InputError(
            f"{path} is not a concept bank (tensor `embeddings`, JSON list `names` in the metadata): {reason}"
        ) from None


def bank_bytes(bank: ConceptBank) -> bytes:
    """The bank as file contents for `read_bank`."""
    return save({"embeddings": np.ascontiguousarray(bank.embeddings)}, {"names": json.dumps(bank.names)})


@lru_cache(maxsize=1)
def imagenet_bank() -> ConceptBank:
    """The thousand classes of ImageNet-1k, by WordNet id and synonyms, without extra files or network access.

    Embeddings are the last-layer rows of the bundled classifier, [1000, 1280]: classes that look alike lie close. This
    is a substitute when no text tower is available, not the papers' text embedding.
    """
    from pipeline.surrogates.pretrained import build_tower

    head = build_tower(EMBEDDED_SURROGATE, weights=None, size=None).head
    assert head is not None
    return _head_bank(head[0])


def text_bank(
    names: Sequence[str], tower: str, *, template: str = TEMPLATE, weights: Path | None = None
) -> ConceptBank:
    """Embed names in the joint space of an open_clip model, not normalised (as in the code of Chen et al. 2024).

    tower     open_clip:MODEL/PRETRAINED; PRETRAINED may be random-SEED for untrained weights
    template  the text to encode; {} is replaced by the name, with underscores as spaces
    Raises SettingsError for an unknown tower or a template without {}, InputError for unavailable weights.
    """
    import open_clip

    from pipeline.surrogates.pretrained import check_surrogate, weights_file

    if "{}" not in template:
        raise SettingsError(f"template {template!r} lacks a {{}} for the name")
    if not tower.startswith("open_clip:"):
        raise SettingsError(f"text tower {tower!r} is not of the form open_clip:ViT-B-32/openai")
    check_surrogate(tower)
    model, _, tag = tower.removeprefix("open_clip:").partition("/")
    path = None if tag.startswith("random-") else weights_file(tower, weights)
    config = open_clip.get_pretrained_cfg(model, tag)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "text tower weights", tag))
        network = open_clip.create_model(
            model,
            pretrained=None if path is None else str(path),
            force_quick_gelu=config.get("quick_gelu", False),
            weights_only=True,
        ).eval()
    tokens = open_clip.get_tokenizer(model)([template.format(name.replace("_", " ")) for name in names])
    with torch.inference_mode():
        encoded = [network.encode_text(part).float().numpy() for part in tokens.split(256)]
    return ConceptBank(tuple(names), np.concatenate(encoded))


def class_names(source: str) -> list[str]:
    """Names from a text file, one per line, or a built-in list: imagenet, cifar100, pets. Raises InputError."""
    path = NAMES / f"{source}.txt" if source in SHIPPED else Path(source)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(("head", *SHIPPED))
        raise InputError(
            f"--concepts {source}: neither one of {known} nor a readable file of names ({error})"
        ) from None
    if len(set(names)) < 2:
        raise InputError(f"--concepts {source}: at least two distinct names are needed")
    return names


def has_text_tower(surrogate: Surrogate) -> bool:
    """True if the surrogate embeds names as well, so that no name is lacking."""
    return surrogate.name.startswith("open_clip:")


def bank_for(source: str | None, surrogate: Surrogate, *, weights: Path | None) -> ConceptBank:
    """The bank that a universal generator is trained with, in the surrogate's own embedding space.

    source  head: the rows of the surrogate's classifier; *.safetensors: a bank; otherwise names (see `class_names`),
            encoded by the surrogate's text tower or looked up among the classes of an ImageNet classifier.
            None: head if there is one, else imagenet.
    Raises SettingsError if the surrogate has neither a classifier nor a text tower, InputError for unusable files.
    """
    if source is not None and source.endswith(".safetensors"):
        return read_bank(Path(source))
    if source in (None, "head"):
        if surrogate.head is not None:
            return _head_bank(surrogate.head[0])
        if source == "head":
            raise SettingsError(f"--concepts head: {surrogate.name} is not a classifier; use names or a bank")
    names = class_names(source or "imagenet")
    if has_text_tower(surrogate):
        return text_bank(names, surrogate.name, weights=weights)
    if surrogate.head is None or len(surrogate.head[0]) != IMAGENET_CLASSES:
        raise SettingsError(f"--concepts {source}: {surrogate.name} has no text tower; use head or a bank")
    if source == "imagenet":  # in the order of the classes, of which two pairs have one name
        return ConceptBank(tuple(names), surrogate.head[0])
    return ConceptBank(tuple(names), _head_bank(surrogate.head[0]).of(names))


def bank_lacks(source: str | None, surrogate: Surrogate) -> dict[str, str]:
    """The names in `source` that `bank_for` would not find, each with near ones in words. Raises InputError."""
    if (
        source in (None, "head", "imagenet")
        or str(source).endswith(".safetensors")
        or has_text_tower(surrogate)
        or not surrogate.head
    ):
        return {}
    return _head_bank(surrogate.head[0]).lacks(class_names(str(source)))


def _head_bank(rows: NDArray[np.float32]) -> ConceptBank:
    """The classes of a classifier, with their names if it is an ImageNet-1k one."""
    if len(rows) != IMAGENET_CLASSES:
        return ConceptBank(tuple(f"class {number}" for number in range(len(rows))), rows)
    return ConceptBank(_imagenet_names(), rows)


def _imagenet_names() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = zip(info.label_names(), info.label_descriptions(), strict=True)
    return tuple(f"{wnid}, {description}" for wnid, description in names)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
