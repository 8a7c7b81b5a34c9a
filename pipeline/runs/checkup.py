"""Checks for what would break a run later: libraries, space, weights and stores, each actually exercised."""

from __future__ import annotations

import io
import platform
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, features

from pipeline import layout
from pipeline.deltas.artefact import named_surrogate
from pipeline.deltas.load import load_protection
from pipeline.errors import InputError, ScumbleError
from pipeline.hashing import library_versions, sha256
from pipeline.layout import RUN_FOLDER
from pipeline.records import Plan, Shard
from pipeline.runs.run_record import RunRecord
from pipeline.shards.inputs import Listing, resolve_input, said_of, told_of_others
from pipeline.storage.places import check_apart
from pipeline.storage.store import Store, file_at
from pipeline.surrogates.pretrained import EMBEDDED_SHA256, EMBEDDED_WEIGHTS, weights_file
from pipeline.surrogates.surrogate import load_surrogate

SHM = Path("/dev/shm")
LEAST_SHM_BYTES = 1_000_000_000  # for Ray's object store in a private cluster
LEAST_SCRATCH_BYTES = 2_000_000_000
_OLDEST_PYTHON = (3, 10)
_CODECS = {"JPEG": ("jpg", "jpg"), "PNG": ("zlib", "png"), "WEBP": ("webp", "webp")}

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the check-up.

    advice  what to do about it; "" if all is well
    """

    level: Level
    subject: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<12} {self.detail}" + (f"; {self.advice}" if self.advice else "")


def findings_of(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; a ScumbleError becomes an error finding, since its message says what to do."""
    try:
        return list(check())
    except ScumbleError as error:
        return [Finding("error", subject, str(error))]


def check_python() -> list[Finding]:
    """Check the interpreter; reports the library versions that decide output bytes."""
    versions = library_versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "pillow", "numpy"))
    if sys.version_info < _OLDEST_PYTHON:
        return [Finding("error", "python", platform.python_version(), "install Python 3.10 or newer")]
    return [Finding("ok", "python", f"{platform.python_version()}, {shown}")]


def check_codecs() -> list[Finding]:
    """Check that every output format survives a round trip through the installed codecs."""
    findings = []
    pixels = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
    for kind, (feature, suffix) in _CODECS.items():
        try:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
            same = np.array_equal(np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB")), pixels)
        except (OSError, KeyError, ValueError) as error:
            findings.append(Finding("error", suffix, f"Pillow cannot write or read it ({error})", _REINSTALL))
            continue
        if kind != "JPEG" and not same:
            findings.append(Finding("error", suffix, "lossless images come back changed", _REINSTALL))
            continue
        version = features.version(feature)
        findings.append(Finding("ok", suffix, f"Pillow writes and reads it ({feature} {version})"))
    return findings


_REINSTALL = "install Pillow again from a wheel: pip install --force-reinstall -c constraints.txt pillow"


def check_space(shards: Iterable[Shard] = (), processes: int = 1) -> list[Finding]:
    """Check shared memory for Ray, and scratch space for shards being written and for what Ray spills.

    shards     of the input, if known
    processes  number of processes that each write one shard at a time
    """
    folder = Path(tempfile.gettempdir())
    need = max([LEAST_SCRATCH_BYTES, *(2 * processes * entry.size for entry in shards)])
    findings = [_space("scratch", folder, need, f"set TMPDIR to a disk with {_gb(need)} free, or use fewer --workers")]
    if SHM.is_dir():
        advice = "give the container more (docker --shm-size=2g, or a larger emptyDir), or Ray falls back to slow disk"
        findings.append(_space("/dev/shm", SHM, LEAST_SHM_BYTES, advice))
    return findings


def _space(subject: str, folder: Path, need: int, advice: str) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        return Finding("error", subject, f"cannot write to {folder} ({error.strerror})", advice)
    detail = f"{_gb(free)} free in {folder}"
    return Finding("ok", subject, detail) if free >= need else Finding("warning", subject, detail, advice)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def check_gpu(gpus_per_worker: float) -> list[Finding]:
    """Compare the GPUs torch sees on this machine with what the run asks for."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        detail = f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
        unused = "" if gpus_per_worker else "the run would use CPUs only; add --gpus-per-worker 1"
        return [Finding("warning" if unused else "ok", "gpu", detail, unused)]
    if gpus_per_worker:
        advice = "install the driver and a CUDA build of torch, or leave --gpus-per-worker at 0"
        return [Finding("error", "gpu", f"torch {torch.__version__} sees no GPU", advice)]
    return [Finding("ok", "gpu", "none, and none requested")]


def check_weights(
    surrogate: str | None, weights: str | None, size: int | None, protection: str | None
) -> list[Finding]:
    """Check that the surrogate's weights are available, as published, and fit its network and the protection, if any.

    surrogate  None: that of the protection, whose size also counts unless another is given, as in a run
    Weights that a library would download are downloaded. Raises a ScumbleError.
    """
    fitted = None
    if protection is not None:
        store, name = file_at(protection)
        fitted = load_protection(store.read(name))
        fitted_name, fitted_size = named_surrogate(fitted.surrogate_id)
        surrogate = surrogate or fitted_name
        size = size or (fitted_size if surrogate == fitted_name else None)
    assert surrogate is not None, "neither a surrogate nor a protection"
    if ":" in surrogate and "random-" in surrogate:
        return [Finding("warning", "weights", f"{surrogate} is untrained", "use a trained surrogate for real work")]
    path = weights_file(surrogate, Path(weights) if weights else None)
    digest = sha256(path.read_bytes())
    published = _published_digest(path)
    if published and not digest.startswith(published):
        advice = "the file is damaged; delete it and run again to download it anew"
        return [
            Finding("error", "weights", f"{path} has SHA-256 {digest[:16]}, but {published[:16]} was published", advice)
        ]
    loaded = load_surrogate(surrogate, weights=path, size=size, device="cpu")
    if fitted is not None:
        fitted.check_surrogate(loaded.id)
    known = "as published" if published else "no published digest to compare against"
    detail = f"{surrogate}, {loaded.dimension} features from {loaded.input_size} px, SHA-256 {digest[:16]} ({known})"
    return [Finding("ok", "weights", detail)]


def _published_digest(path: Path) -> str | None:
    """The digest in the file's name, if any: complete in the Hugging Face cache, a prefix in torch's."""
    if path == EMBEDDED_WEIGHTS:
        return EMBEDDED_SHA256
    real = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", real):
        return real
    beginning = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$", real)
    return beginning[1] if beginning else None


def check_input(url: str, keep_sidecar: Collection[str] = ()) -> tuple[Listing, list[Finding]]:
    """Resolve the input, as resolve_input, and check that its first shard can be read. Raises a ScumbleError."""
    listing = resolve_input(url, keep_sidecar)
    store, shards, passed_over = listing.store, listing.shards, listing.passed_over
    first = shards[0].images[0].files[0] if shards[0].images else shards[0]
    with store.open(first.name) as stream:
        beginning = stream.read(512)
    plan = Plan(tuple(shards), "")
    if len(beginning) < min(512, first.size):
        raise InputError(f"{store.url}/{first.name} ends after {len(beginning)} bytes; upload it again")
    said = f"{url}: {plan.contents}, {_gb(plan.total_bytes)}"
    findings = [Finding("ok", "input", said)]
    if listing.others:
        findings.append(Finding("ok", "input", f"not copied: {told_of_others(listing.others)}"))
    if passed_over:
        findings.append(
            Finding("warning", "input", said_of(passed_over), "a run will end with exit code 3 because of these")
        )
    return listing, findings


def check_output(url: str, source: Store | None = None) -> list[Finding]:
    """Check writing, reading, deleting and create-if-absent in the output. Raises a ScumbleError.

    source  the input, if known: nothing is written if it is the same place as the output
    """
    store = Store(url)
    if source is not None:
        check_apart(source, store)
    name = f"{RUN_FOLDER}/probe-{uuid.uuid4().hex}"
    store.put(name, b"probe")
    if store.read(name) != b"probe":
        return [Finding("error", "output", f"{url} returned different bytes than were written", "use another store")]
    store.delete([name])
    findings = [Finding("ok", "output", f"{url} allows writing, reading and deleting")]
    if store.honours_create():
        findings.append(Finding("ok", "commits", "create-if-absent works, as commits require"))
    else:
        advice = "never run two jobs on one output at the same time, or use a store that honours If-None-Match"
        findings.append(Finding("warning", "commits", "the store ignores create-if-absent", advice))
    if (record := RunRecord.read(store, layout.RUN)) is not None:
        detail = f"{url} holds run {record.fingerprint[:16]}; the same settings resume it, others are refused"
        findings.append(Finding("ok", "resume", detail))
    return findings


def compare_versions(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> list[Finding]:
    """Report an error if libraries that decide output bytes differ between the driver and a node."""
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if not names:
        return [
            Finding("ok", where, ", ".join(f"{name} {theirs[name]}" for name in ("ray", "python") if name in theirs))
        ]
    shown = ", ".join(f"{name} {theirs.get(name)} (driver {ours.get(name)})" for name in names)
    return [
        Finding(
            "error",
            where,
            f"versions differ from the driver: {shown}",
            "use the same image or the same constraints.txt everywhere",
        )
    ]
