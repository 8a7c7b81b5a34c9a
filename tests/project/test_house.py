"""The house: which room may import which, how large a room may grow, and that all of it is documented."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("pipeline", "actors", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]
FOLDERS = sorted({path.parent for path in FILES})
FORBIDDEN = {
    "pipeline": {"ray", "argparse", "actors", "jobs"},
    "actors": {"jobs", "argparse"},
    "jobs": {"torch", "numpy", "faiss"},
}
# a room imports only rooms that stand before it; those of the last line do not import each other
ROOMS = (
    *("words", "storage", "pictures", "shards", "surrogates", "clusters", "deltas", "fitting", "measures", "runs"),
    *("packing", "report"),
)
LAST_ROOMS = ("one_for_all", "relearning", "uploads", "baselines")
# except that baselines train their surrogates as adversaries train targets
ALSO = {"baselines": {"relearning"}}
ONLY_STORE = {"fsspec", "s3fs", "botocore", "aiohttp"}
JOBS = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
LARGEST_FOLDER = 13


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, those of this repository by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (within & MODULES) or {node.module}
    return found


def room_of(module: str) -> str:
    """The room of a module of `pipeline`."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in ROOMS + LAST_ROOMS else "words"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_package_opens_a_forbidden_door(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    first_names = {module.partition(".")[0] for module in imported(path)}
    assert not first_names & FORBIDDEN[package]
    if package == "pipeline" and not name(path).startswith("pipeline/storage/"):
        assert not first_names & ONLY_STORE


@pytest.mark.parametrize("path", [path for path in FILES if name(path).startswith("pipeline/")], ids=name)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    here = room_of(dotted(path))
    before = ROOMS[: ROOMS.index(here)] if here in ROOMS else ROOMS
    rooms = {room_of(module) for module in imported(path) if module.startswith("pipeline.")}
    assert rooms <= {*before, here, *ALSO.get(here, set())}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {dotted(path): imported(path) & MODULES for path in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_is_neither_a_single_file_nor_a_crowd(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert (folder / "__init__.py").is_file()
    assert len(modules) + len([path for path in folder.iterdir() if path in FOLDERS]) >= 2
    assert len(modules) <= LARGEST_FOLDER


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_job_imports_another_job(path: Path) -> None:
    assert not imported(path) & {f"jobs.{job}" for job in JOBS}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_and_no_function_grows_too_big(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_public_name_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_map_names_every_room() -> None:
    rooms = {folder.name for folder in FOLDERS if folder.parent == ROOT / "pipeline"}
    assert rooms == {*ROOMS, *LAST_ROOMS} - {"words"}
    import pipeline

    assert pipeline.__doc__ is not None
    assert rooms <= set(re.findall(r"\w+", pipeline.__doc__))


def test_the_top_level_is_the_card_s() -> None:
    card = {"pyproject.toml", "pipeline", "actors", "jobs", "k8s", "tests", "README.md"}
    small = {"Makefile", "LICENSE", "constraints.txt"}
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - {"data", "demo", "build", "dist", "scumble.egg-info"} <= card | small


# what every job has, every kind of tower, every home of objects
SHARED_INTERFACES = {"main", "assemble", "fetch", "models", "source", "tags", "clock"}


def test_no_public_name_is_defined_twice() -> None:
    defined = Counter(
        node.name
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    assert {found for found, times in defined.items() if times > 1} <= SHARED_INTERFACES
