"""Paths below an output prefix. Shards keep their names; everything else is in one folder."""

from __future__ import annotations

RUN_FOLDER = "_scumble"

RUN = f"{RUN_FOLDER}/run.json"
STATUS = f"{RUN_FOLDER}/status.json"
PROGRESS = f"{RUN_FOLDER}/progress.json"
PROFILE = f"{RUN_FOLDER}/profile.json"
PASSED_OVER = f"{RUN_FOLDER}/passed_over.jsonl"  # parts of the input that are not read, in quarantine format
PLAN = f"{RUN_FOLDER}/plan.parquet"
CLUSTERING = f"{RUN_FOLDER}/clustering.safetensors"
PROTECTION = f"{RUN_FOLDER}/protection.safetensors"
SCORES = f"{RUN_FOLDER}/scores.parquet"
REMOVAL = f"{RUN_FOLDER}/removal.json"
GALLERY = f"{RUN_FOLDER}/gallery.safetensors"
CLUSTERS_REPORT = f"{RUN_FOLDER}/clusters.json"
REPORT = f"{RUN_FOLDER}/report.html"

FEATURES = f"{RUN_FOLDER}/features"
ASSIGNMENTS = f"{RUN_FOLDER}/assignments"
CLUSTERS = f"{RUN_FOLDER}/clusters"
DELTAS = f"{RUN_FOLDER}/deltas"
BASELINE_CHECKPOINT = f"{DELTAS}/checkpoint"  # of a published method that trains a network, until it is done
COMMITS = f"{RUN_FOLDER}/commits"
QUARANTINE = f"{RUN_FOLDER}/quarantine"


def features(shard: str) -> str:
    """Embeddings of one shard."""
    return f"{FEATURES}/{shard}.parquet"


def assignment(shard: str) -> str:
    """The cluster of every usable sample of one shard."""
    return f"{ASSIGNMENTS}/{shard}.parquet"


def fitted(unit: str) -> str:
    """A finished fit: of one cluster, or "all" if deltas are fitted jointly."""
    return f"{CLUSTERS}/{unit}.safetensors"


def fit_checkpoint(unit: str) -> str:
    """An unfinished fit, to resume from."""
    return f"{CLUSTERS}/{unit}.checkpoint.safetensors"


def keyed_deltas(shard: str) -> str:
    """The deltas of a shard's samples, by key."""
    return f"{DELTAS}/{shard}.safetensors"


def commit(shard: str) -> str:
    """The record that makes a shard's output count."""
    return f"{COMMITS}/{shard}.json"


def quarantine(shard: str) -> str:
    """The shard's quarantine, one line per sample."""
    return f"{QUARANTINE}/{shard}.jsonl"


UPLOADS = f"{RUN_FOLDER}/uploads"
UPLOADS_ORIGIN = f"{UPLOADS}/run.json"
UPLOADS_LEASE = f"{UPLOADS}/lease.json"
UPLOADS_LEDGER = f"{UPLOADS}/ledger.json"
UPLOADS_LAST_RUN = f"{UPLOADS}/last-run.json"
UPLOADS_PROGRESS = f"{UPLOADS}/progress.json"
UPLOADS_COMMITS = f"{UPLOADS}/commits"
UPLOADS_SEGMENTS = f"{UPLOADS}/ledger"


def upload_commit(unit: str) -> str:
    """The record that makes a unit of new uploads count."""
    return f"{UPLOADS_COMMITS}/{unit}.json"


def upload_segment(name: str) -> str:
    """A sorted part of the uploads' ledger."""
    return f"{UPLOADS_SEGMENTS}/{name}.parquet"


def upload_quarantine(unit: str) -> str:
    """The quarantine of a unit of new uploads, one line per image."""
    return f"{UPLOADS}/quarantine/{unit}.jsonl"


PACK = f"{RUN_FOLDER}/pack"
PACK_RUN = f"{PACK}/run.json"
PACK_PLAN = f"{PACK}/plan.parquet"
PACK_CLASSES = f"{PACK}/classes.txt"
PACK_PASSED_OVER = f"{PACK}/passed_over.jsonl"  # what was not packed, in quarantine format
PACK_COMMITS = f"{PACK}/commits"


def pack_commit(shard: str) -> str:
    """The record that makes a packed or unpacked shard count."""
    return f"{PACK_COMMITS}/{shard}.json"


def pack_quarantine(shard: str) -> str:
    """What could not be packed or unpacked of a shard, one line per image."""
    return f"{PACK}/quarantine/{shard}.jsonl"


def pack_labels(shard: str) -> str:
    """Path and class of what was unpacked of a shard, as CSV."""
    return f"{PACK}/labels/{shard}.csv"


def training_progress(protection: str) -> str:
    """How far the training of a universal generator is, beside the file that it will be."""
    return f"{protection}.progress.json"
