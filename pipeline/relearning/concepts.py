"""A bank of concepts, name -> embedding, and k-means of label names into classes by their embeddings.

file       safetensors: embeddings [m, d]; names as a JSON list in the metadata
text       the text tower of an open_clip model
built in   the last layer of the classifier shipped here: its weights of a class are the class's embedding
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from pipeline.errors import InputError, SettingsError
from pipeline.fingerprint import derive
from pipeline.settings import EMBEDDED_SURROGATE, near_matches

TEMPLATE = "a photo of a {}"  # Chen et al. 2024


@dataclass(frozen=True, eq=False)
class ConceptBank:
    """names [m], each perhaps several synonyms between commas; embeddings float32 [m, d], d >= 1.

    Raises InputError for shapes that do not fit and embeddings that are not finite.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.embeddings.shape
        if len(shape) != 2 or shape[0] != len(self.names) or not self.embeddings.size:
            raise InputError(f"a concept bank has one embedding per name: {len(self.names)} names, embeddings {shape}")
        if not np.isfinite(self.embeddings).all():
            raise InputError("the embeddings of a concept bank must be finite")

    def of(self, class_names: Sequence[str]) -> NDArray[np.float32]:
        """Embedding of each class name, [k, d].

        The mean over all concepts with that name; else with that synonym; else with a synonym that ends in that word
        ('dog' finds 'Eskimo dog'). Case, hyphens and underscores do not count.
        Raises InputError, with near matches, for names that the bank does not have.
        """
        tiers = self._tiers()
        found, missing = [], []
        for name in class_names:
            rows = next((tier[_plain(name)] for tier in tiers if _plain(name) in tier), None)
            if rows is None:
                missing.append(name)
            else:
                found.append(self.embeddings[rows].mean(axis=0))
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            near = near_matches(_plain(missing[0]), list(tiers[1]))
            raise InputError(f"{len(missing)} of {len(class_names)} classes are not in the concept bank: {shown}{near}")
        return np.stack(found)

    def _tiers(self) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, list[int]]]:
        """Rows by whole name, by synonym, and by every ending of a synonym."""
        whole: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        endings: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            whole.setdefault(_plain(name), []).append(row)
            parts = {_plain(part) for part in name.split(",")}
            words = [part.split() for part in parts]
            for part in parts:
                synonyms.setdefault(part, []).append(row)
            for ending in {" ".join(one[start:]) for one in words for start in range(1, len(one))}:
                endings.setdefault(ending, []).append(row)
        return whole, synonyms, endings


def read_bank(path: Path) -> ConceptBank:
    """The bank of a safetensors file. Raises InputError for a file that is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["names"])
            embeddings = np.asarray(file.get_tensor("embeddings"), dtype=np.float32)
        return ConceptBank(tuple(str(name) for name in names), embeddings)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path} is no concept bank (tensor embeddings, JSON list names in metadata): {reason}"
        ) from None


def bank_bytes(bank: ConceptBank) -> bytes:
    """The bank as a file that `read_bank` reads."""
    return save({"embeddings": np.ascontiguousarray(bank.embeddings)}, {"names": json.dumps(bank.names)})


@lru_cache(maxsize=1)
def imagenet_bank() -> ConceptBank:
    """The thousand classes of ImageNet-1k, by WordNet id and synonyms, without any file or network.

    Embeddings are the rows of the last layer of the classifier shipped here, [1000, 1280]: classes that look alike lie
    close, which serves where no text tower is at hand but is not the papers' text embedding.
    """
    from timm.data import ImageNetInfo

    from pipeline.pretrained import build

    head = build(EMBEDDED_SURROGATE, weights=None, size=None).head
    assert head is not None
    info = ImageNetInfo("imagenet-1k")
    names = zip(info.label_names(), info.label_descriptions(), strict=True)
    return ConceptBank(tuple(f"{wnid}, {description}" for wnid, description in names), head[0])


def text_bank(
    names: Sequence[str], tower: str, *, template: str = TEMPLATE, weights: Path | None = None
) -> ConceptBank:
    """Names in the joint space of an open_clip model, not normalised (as the released code of Chen et al. 2024).

    tower     open_clip:MODEL/PRETRAINED; random-SEED for untrained weights
    template  what is encoded; {} stands for the name, underscores in it become spaces
    Raises SettingsError for an unknown tower or a template without {}, InputError for weights that cannot be had.
    """
    import open_clip

    from pipeline.pretrained import check_surrogate, weights_file

    if "{}" not in template:
        raise SettingsError(f"template {template!r} has no {{}} for the name")
    if not tower.startswith("open_clip:"):
        raise SettingsError(f"text tower {tower!r} is not like open_clip:ViT-B-32/openai")
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


def group_concepts(points: NDArray[np.float32], num_groups: int, *, seed: int) -> NDArray[np.int64]:
    """k-means of embeddings [k, d] -> group of each, int64 [k]; groups are numbered as they first occur.

    The best of ten starts (k-means++). Raises SettingsError unless 2 <= num_groups < number of different embeddings.
    """
    different = len(np.unique(points, axis=0))
    if not 2 <= num_groups < different:
        raise SettingsError(f"{different} different concepts make 2 to {different - 1} groups, not {num_groups}")
    found = KMeans(num_groups, n_init=10, random_state=derive(seed, "concept groups", num_groups) % 2**32).fit(points)
    _, first, groups = np.unique(found.labels_, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups].astype(np.int64)


def grouping_quality(points: NDArray[np.float32], groups: NDArray[np.int64]) -> dict[str, float]:
    """sse: sum of squared distances to the group's mean; silhouette: mean (b - a) / max(a, b); calinski_harabasz.

    The criteria by which Chen et al. 2024, section 4.6, choose the number of groups; euclidean.
    """
    wide = points.astype(np.float64)
    sse = sum(((wide[groups == one] - wide[groups == one].mean(axis=0)) ** 2).sum() for one in np.unique(groups))
    return {
        "sse": float(sse),
        "silhouette": float(silhouette_score(wide, groups)),
        "calinski_harabasz": float(calinski_harabasz_score(wide, groups)),
    }


def sweep_groups(
    points: NDArray[np.float32], *, seed: int, counts: Iterable[int] = range(5, 37)
) -> dict[int, dict[str, float]]:
    """Quality by number of groups, for those counts that the concepts allow (Zhang et al. 2023, Fig. 4: 5 to 36)."""
    largest = len(np.unique(points, axis=0)) - 1
    return {
        count: grouping_quality(points, group_concepts(points, count, seed=seed))
        for count in counts
        if 2 <= count <= largest
    }


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
