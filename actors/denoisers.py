"""Denoisers of purifying adversaries, trained once per evaluation and kept in its output for restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.cluster.placement import Workers
from actors.trials import Loading
from pipeline.relearning.collection import Collection
from pipeline.relearning.denoisers.denoiser import Denoiser, DenoiserRecipe, denoiser_from_bytes, train_denoiser
from pipeline.relearning.denoisers.diffusion import train_diffusion
from pipeline.relearning.denoisers.pairs import check_other_pictures, denoiser_digest, pair_up, training_data
from pipeline.relearning.evaluation import SELF_PAIRS
from pipeline.relearning.regime_names import AVATAR
from pipeline.storage.store import Store

FOLDER = "denoisers"  # below the output
_SEED = 0  # an adversary's, whatever the seeds of the trials


@dataclass(frozen=True)
class DenoiserFacts:
    """What the driver learns about a denoiser.

    num_pictures  that it was made of, including held-out ones
    is_new        False if it was found in the output
    """

    digest: str
    gain_db: float
    num_steps: int
    num_pictures: int
    is_new: bool


def make_denoiser(
    name: str,
    output: Store,
    side: int,
    workers: Workers,
    *,
    pairs: tuple[Any, Any] | None,
    evaluated: tuple[Any, ...],
    recipe: DenoiserRecipe | None = None,
) -> Loading:
    """The Denoiser of a regime of SHARED_DENOISERS; waiting for it gives DenoiserFacts.

    pairs      references to the Collections of other pictures and of their protected copies; None: `purify` and
               `avatar` are trained on the built-in photographs
    evaluated  references to the Collections that must not contain any picture of the pairs

    Waiting raises InputError for pairs that do not match.
    """
    task = ray.remote(find_or_train).options(num_cpus=workers.cpus, num_gpus=workers.gpus, num_returns=2)
    about = (name, output, side, workers.device, workers.threads, recipe or DenoiserRecipe())
    return Loading(*task.remote(*about, len(pairs or ()), *(pairs or ()), *evaluated))


def find_or_train(
    name: str,
    output: Store,
    side: int,
    device: str,
    threads: int,
    recipe: DenoiserRecipe,
    num_paired: int,
    *collections: Collection,
) -> tuple[Denoiser, DenoiserFacts]:
    """The denoiser found in the output, or a new one, which is written there.

    collections  the pairs, if `num_paired` is 2, then what is evaluated: Ray resolves no references inside tuples
    """
    torch.set_num_threads(threads)
    pairs = None
    if num_paired:
        pairs = pair_up(*collections[:num_paired])
        check_other_pictures(pairs[0], *collections[num_paired:])
    clean, protected = training_data(side, pairs, is_noise=name != SELF_PAIRS)
    digest = denoiser_digest(clean, protected, recipe, _SEED, "diffusion" if name == AVATAR else "noise")
    place = f"{FOLDER}/{digest[:20]}.safetensors"
    kept = output.read_if_there(place)
    if kept is not None:
        denoiser = denoiser_from_bytes(kept, f"{output.url}/{place}")
    else:
        pictures = torch.from_numpy(clean.copy())  # arrays from an object store are read-only
        how: dict[str, Any] = {"seed": _SEED, "device": device, "recipe": recipe, "digest": digest}
        if name == AVATAR:
            denoiser = train_diffusion(pictures, **how)
        else:
            copies = None if protected is None else torch.from_numpy(protected.copy())
            denoiser = train_denoiser(pictures, copies, **how)
        if not output.create(place, denoiser.to_bytes()):  # another evaluation over this output was faster
            denoiser = denoiser_from_bytes(output.read(place), f"{output.url}/{place}")
    facts = DenoiserFacts(digest, denoiser.gain_db, denoiser.num_steps, len(clean), is_new=kept is None)
    return denoiser, facts
