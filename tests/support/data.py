"""Where the real data sets lie that tests/make_data.py makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PLACES = [ROOT / "data", ROOT.parent / "shared" / "data"]


def data_folder() -> Path:
    """$SCUMBLE_DATA, else data/ in this checkout, else a folder that several checkouts share."""
    if "SCUMBLE_DATA" in os.environ:
        return Path(os.environ["SCUMBLE_DATA"])
    return next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def set_at_hand(name: str) -> Path:
    """The folder of one data set; the test that asks is skipped, and says so, where there is none."""
    folder = data_folder() / name
    if not folder.is_dir():
        pytest.skip(f"there is no {name}/ in {folder.parent}; tests/README.md says how to get it")
    return folder
