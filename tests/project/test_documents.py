"""The documents: short where they must be, true where that can be checked, and their examples run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.data import ROOT

NOT_OURS = {".git", ".venv", "data", "demo", "build", "dist"}
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] not in NOT_OURS)
SHOWING_FLAGS = ("README.md", "jobs/README.md", "tests/README.md", ".github/CHANGELOG.md")
OF_OTHER_COMMANDS = {"--working-dir", "--no-install-recommends", "--", "--s3"}
BUILT_ELSEWHERE = {"gpu.md", "gpu.json"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of a document in one language; "" is a block that names none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What a link may have after '#': headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 130


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in (link for link in links if not re.match(r"[a-z]+:", link)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_no_document_names_a_place_that_only_its_authors_have(path: Path) -> None:
    assert not re.search(r"/work\b|\.\./shared|shared/data|\bDATA\b", path.read_text())


@cache
def flags_of(job: str) -> frozenset[str]:
    """Every flag that jobs/JOB.py, and what it imports of `jobs`, gives to a parser."""
    todo, seen, flags = [ROOT / "jobs" / f"{job}.py"], set[Path](), {"--help"}
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                first = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
                flags |= {flag for flag in first if isinstance(flag, str) and flag.startswith("--")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jobs"):
                module = ROOT.joinpath(*(node.module or "").split("."))
                todo += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
    return frozenset(flags)


def commands(name: str) -> Iterator[tuple[str, str]]:
    """(job, the rest of its line) of every command that a document shows, lines that go on joined."""
    joined = re.sub(r"\\\n\s*", " ", text_of(name))
    yield from re.findall(r"python (?:jobs/|-m jobs\.)(\w+)(?:\.py)?([^\n`]*)", joined)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_that_is_shown_exists_with_its_flags(path: Path) -> None:
    for job, rest in commands(named(path)):
        if job == "NAME":
            continue
        assert (ROOT / "jobs" / f"{job}.py").is_file(), job
        shown = {flag.split("=")[0] for flag in re.findall(r"(?<!\S)--[\w-]+", rest.partition("#")[0])}
        assert shown <= flags_of(job), (job, shown - flags_of(job))


@pytest.mark.parametrize("name", SHOWING_FLAGS)
def test_every_flag_that_is_shown_exists(name: str) -> None:
    known = {flag for path in (ROOT / "jobs").glob("*.py") for flag in flags_of(path.stem)} | OF_OTHER_COMMANDS
    known |= set(re.findall(r'add_argument\("(--[\w-]+)"', text_of("tests/make_data.py")))
    shown = set(re.findall(r"(?<![\w-])--[\w-]*", text_of(name)))
    assert {flag for flag in shown if flag.strip("-")} <= known


def test_scripts_that_are_shown_exist() -> None:
    for path in DOCUMENTS:
        for script in re.findall(r"\btests/[\w/]+\.(?:py|sh)\b", path.read_text()):
            assert (ROOT / script).is_file(), f"{named(path)}: {script}"


def test_every_file_of_the_code_is_in_the_map() -> None:
    page = text_of("pipeline/README.md")
    named_files = set(re.findall(r"`([\w/]+\.py|\w+/)`", page))
    for package in ("pipeline", "actors", "jobs"):
        for path in (path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"):
            folders = {f"{part}/" for part in path.relative_to(ROOT / package).parts[1:-1]}
            assert path.name in named_files or folders & named_files, named(path)
    existing = {path.name for path in ROOT.rglob("*.py")} | {named(path) for path in (ROOT / "tests").rglob("*.py")}
    assert {name for name in named_files if name.endswith(".py")} <= existing


def test_every_result_is_listed_with_its_command() -> None:
    page = text_of("tests/bench/results/README.md")
    results = {path.name for path in (ROOT / "tests/bench/results").iterdir()} - {"README.md"} - BUILT_ELSEWHERE
    assert {name for name in results if f"({name})" not in page} == set()


def test_no_protection_is_shown_without_what_was_relearned() -> None:
    table = text_of("README.md").partition("<!-- audit")[2].partition("<!-- /audit")[0]
    columns = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert len(set(columns)) == 1
    relearned = next(line for line in table.splitlines() if "relearned" in line)
    assert all("%" in cell for cell in relearned.split("|")[2:-1])


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program with this checkout's packages, on one core."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **threads}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_notebook_protects_ten_pictures_and_shows_them(tmp_path: Path) -> None:
    (example,) = blocks("pipeline/README.md", "python")
    done = python(example, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest change 16 of 255") == 10
    sheet = np.asarray(Image.open(tmp_path / "ten.png"))
    assert sheet.shape == (3 * 128, 10 * 128, 3)
    before, after = sheet[:128].astype(int), sheet[128:256].astype(int)
    assert np.abs(after - before).max() == 16


def test_a_folder_of_pictures_is_packed_as_the_readme_says(tmp_path: Path) -> None:
    for name in ("a.jpg", "b/c.d.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    (command,) = re.findall(r"^python (jobs/pack.py --input photos/ .*)$", text_of("README.md"), re.MULTILINE)
    job, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / job), *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert [name for name in names if not name.startswith("b/")] == ["a.jpg", "a.json"]
        assert [name.rpartition(".")[2] for name in names if name.startswith("b/c_d~")] == ["jpg", "cls", "json"]
        packed = tar.extractfile("a.jpg")
        assert packed is not None
        assert packed.read() == (tmp_path / "photos" / "a.jpg").read_bytes()
