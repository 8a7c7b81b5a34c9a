"""The house: which room may import which, how large a room may grow, and that the README names every file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [path for room in ("pipeline", "actors", "jobs") for path in sorted((ROOT / room).rglob("*.py"))]
FORBIDDEN = {
    "pipeline": {"ray", "argparse", "actors", "jobs"},
    "actors": {"jobs", "argparse"},
    "jobs": {"torch", "numpy", "faiss"},
}
ONLY_STORE = {"fsspec", "s3fs", "botocore", "aiohttp"}
JOBS = {"protect_imagenet", "protect_uploads", "train_one_for_all", "evaluate_relearning"}
JOBS |= {"demo", "verify", "status", "report", "doctor"}


def imports(path: Path) -> set[str]:
    """First names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_no_room_opens_a_forbidden_door(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert not imports(path) & FORBIDDEN[room]
    if room == "pipeline" and path.name not in ("store.py", "failures.py"):
        assert not imports(path) & ONLY_STORE


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_no_job_imports_another_job(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jobs"):
            assert node.module.partition(".")[2] not in JOBS


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_no_room_and_no_function_grows_too_big(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 61, node.name


@pytest.mark.parametrize("path", [p for p in ROOMS if p.parts[-2] == "pipeline"], ids=name)
def test_every_public_name_of_the_pipeline_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_readme_names_every_file_and_every_flag_it_shows_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in ROOMS:
        folders = path.relative_to(ROOT).parts[1:-1]
        if folders:
            assert f"`{folders[0]}/`" in readme, name(path)
        elif path.name != "__init__.py":
            assert f"`{path.name}`" in readme, name(path)
    from jobs.doctor import doctor_parser
    from jobs.evaluation.options import evaluation_parser
    from jobs.one_for_all.options import one_for_all_parser
    from jobs.protection.options import protection_parser
    from jobs.uploads.options import uploads_parser

    parsers = (protection_parser(), evaluation_parser(), one_for_all_parser(), uploads_parser(), doctor_parser())
    actions = [action for parser in parsers for action in parser._actions]
    known = {flag for action in actions for flag in action.option_strings}
    shown = {word.strip("`.,:)") for word in readme.split() if word.strip("`(").startswith("--")}
    others = {"--working-dir", "--output", "--", "--ray"}
    assert {word.strip("(").split("=")[0] for word in shown} <= known | others


def test_the_top_level_is_the_card_s() -> None:
    card = {"pyproject.toml", "pipeline", "actors", "jobs", "k8s", "tests", "README.md"}
    small = {"Makefile", "LICENSE", "constraints.txt"}
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert tracked - {"demo", "build", "dist", "scumble.egg-info"} <= card | small
