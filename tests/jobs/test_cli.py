"""What all commands share: one line for any failure, its exit code, and nothing that hangs on `assert`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.protection.options import protection_parser
from jobs.shared.cli import Parser, given_options, print_left_out, read_config
from pipeline.errors import ClusterError, InputError, SettingsError, ending
from pipeline.shards.squares import LeftOut
from tests.support import runs

JOB = """
import sys
from jobs.shared import cli
from pipeline.errors import StoreError

def main(argv=None):
    parser = cli.Parser(prog="job")
    parser.add_argument("--config")
    parser.add_argument("--debug", action="store_true", default=None)
    cli.given_options(parser, argv)
    {body}
    return 0

raise SystemExit(cli.run(main))
"""


# what each command needs to get past its options
ENOUGH = {
    "concepts": ["--output", "o.safetensors"],
    "demo": ["--output", "o"],
    "doctor": [],
    "evaluate_relearning": ["--clean", "c", "--test", "t", "--output", "o"],
    "pack": ["--input", "i", "--output", "o"],
    "protect_baseline": ["--method", "sp", "--input", "i", "--output", "o"],
    "protect_imagenet": ["--input", "i", "--output", "o"],
    "protect_uploads": ["--input", "i", "--output", "o", "--protection", "p"],
    "report": ["--output", "o"],
    "status": ["--output", "o"],
    "train_one_for_all": ["--input", "i", "--output", "o"],
    "unpack": ["--input", "i", "--output", "o"],
    "verify": ["--output", "o"],
}
HEAVY = {
    *("torch", "torchvision", "timm", "open_clip", "kornia", "safetensors", "huggingface_hub"),
    *("numpy", "scipy", "sklearn", "skimage", "faiss", "pandas", "pyarrow", "cv2", "PIL"),
    *("ray", "fsspec", "s3fs", "botocore", "aiohttp", "matplotlib", "jinja2", "prometheus_client", "tqdm"),
}
TELLS_MODULES = "import atexit, sys\natexit.register(lambda: print('modules:', *sys.modules, file=sys.stderr))\n"
REFUSES = "test_what_cannot_be_trained_is_refused_before_a_cluster_is_asked"
COMMANDS = sorted(path.stem for path in (runs.ROOT / "jobs").glob("*.py") if "__main__" in path.read_text())


def run(tmp_path: Path, body: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "job.py").write_text(JOB.format(body=body))
    return subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), **environment},
    )


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise StoreError('s3://a: refused\\nby the bucket')", 1, "error: s3://a: refused by the bucket"),
        ("raise TypeError('not ours\\n  at all')", 1, "error: TypeError: not ours at all (unexpected; "),
        ("raise KeyError", 1, "error: KeyError: KeyError (unexpected; --debug shows where)"),
        ("raise MemoryError", 1, "error: MemoryError: MemoryError (unexpected; "),
        ("raise KeyboardInterrupt", 130, "stopped; run the same command again to resume"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 130, "stopped; run the same command again"),
        (
            "from threading import Thread; t = Thread(target=int, args='x'); t.start(); t.join()",
            0,
            "error: ValueError: ",
        ),
    ],
)
def test_any_failure_is_one_line_and_only_debug_shows_where(tmp_path: Path, body: str, code: int, line: str) -> None:
    plain = run(tmp_path, body)
    assert plain.returncode == code
    assert plain.stderr.startswith(line)
    assert plain.stderr.count("\n") == 1
    (tmp_path / "debug.yaml").write_text("debug: true\n")
    for options in (["--debug"], ["--config", str(tmp_path / "debug.yaml")]):
        told = run(tmp_path, body, *options)
        assert told.returncode == code
        assert "Traceback (most recent call last)" in told.stderr
        assert line in told.stderr


def test_tracebacks_of_libraries_and_destructors_are_shown_by_debug_alone(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "import logging\n"
        "class Closing:\n"
        "    def __del__(self):\n"
        "        raise OSError('in a destructor')\n"
        "def work():\n"
        "    Closing()\n"
        "    try:\n"
        "        int('x')\n"
        "    except ValueError:\n"
        "        logging.getLogger('library').exception('could not count')\n"
    )
    body, here = "import library; library.work()", os.pathsep.join([str(runs.ROOT), str(tmp_path)])
    plain = run(tmp_path, body, PYTHONPATH=here)
    assert plain.stderr == "ERROR library could not count: invalid literal for int() with base 10: 'x'\n"
    told = run(tmp_path, body, "--debug", PYTHONPATH=here)
    assert told.stderr.count("Traceback (most recent call last)") == 2
    assert "OSError: in a destructor" in told.stderr


def test_names_that_a_terminal_cannot_show_end_no_command(tmp_path: Path) -> None:
    done = run(tmp_path, "print('caf\\xe9 \\udcff … done')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "caf\\xe9 \\udcff \\u2026 done\n"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad", b"a: 2024-13-45", b"[" * 5000, b"a: [", b"- one"])
def test_a_settings_file_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_config(path, Parser(prog="job"))
    assert str(caught.value).startswith(f"--config {path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_options_win_over_the_settings_file(tmp_path: Path) -> None:
    parser = Parser(prog="job")
    for name in ("--config", "--one", "--two"):
        parser.add_argument(name)
    (tmp_path / "settings.yaml").write_text("one: a\ntwo: b\n")
    given = given_options(parser, ["--config", str(tmp_path / "settings.yaml"), "--two", "c"])
    assert given == {"one": "a", "two": "c"}


def test_each_kind_of_failure_has_its_exit_code() -> None:
    found = [ending(error) for error in (SettingsError("a"), InputError("b"), ClusterError("c"), OSError())]
    assert [code for _, code in found] == [2, 1, 1, 1]


@pytest.mark.parametrize("options", [["--workers", "0"], ["--decode", "nan"]])
def test_verify_refuses_numbers_that_cannot_be(tmp_path: Path, options: list[str]) -> None:
    job = [sys.executable, str(runs.ROOT / "jobs/verify.py"), "--output", str(tmp_path), *options]
    refused = subprocess.run(job, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        ("error: --workers must be at least 1", "error: --decode is a share between 0 and 1")
    )


@pytest.mark.slow
def test_no_promise_of_the_command_line_hangs_on_assert() -> None:
    """Python's -O deletes `assert`; pytest's own rewriting keeps those of the tests."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-W", "ignore::pytest.PytestConfigWarning"]
    files = ["tests/jobs/test_cli.py", "tests/jobs/test_options.py", "tests/relearning/test_collection.py"]
    files += [f"tests/words/test_{name}.py" for name in ("settings", "json_record")]
    files += ["tests/uploads/test_records.py", "tests/pictures/test_augment.py"]
    files += ["tests/relearning/test_evaluate_relearning.py::" + REFUSES]
    done = subprocess.run(
        [*command, *files, "-m", "not slow", "-k", "not hangs_on_assert and not ctrl_c"],
        cwd=runs.ROOT,
        env={**os.environ, "PYTHONOPTIMIZE": "1", "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_settings_file_that_is_not_utf8_is_one_line_of_usage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("output: geschützt\n".encode(encoding))
    with pytest.raises(SettingsError, match=rf"--config {path}: not UTF-8; save it as UTF-8"):
        read_config(path, protection_parser())
    path.write_bytes("output: geschützt\n".encode("utf-8-sig"))
    assert read_config(path, protection_parser()) == {"output": "geschützt"}


@pytest.mark.parametrize("imported", ["yaml", "numpy"])  # with the options, and with the steps
@pytest.mark.parametrize("started", [[f"jobs/{name}.py"] for name in COMMANDS] + [["-m", "jobs.protect_imagenet"]])
def test_ctrl_c_during_the_imports_is_one_line_too(tmp_path: Path, started: list[str], imported: str) -> None:
    # in short sleeps: a signal between the last look at signals and one long sleep would not be seen before its end
    slow = "import pathlib, time\npathlib.Path(__file__ + '.seen').touch()\nfor _ in range(1200): time.sleep(0.05)"
    (tmp_path / f"{imported}.py").write_text(slow)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{runs.ROOT}"}
    command = [sys.executable, *started, *ENOUGH[Path(started[-1].replace("jobs.", "jobs/")).stem]]
    with subprocess.Popen(command, cwd=runs.ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        runs.wait_for((tmp_path / f"{imported}.py.seen").exists, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert said == "stopped; run the same command again to resume\n"
    assert process.returncode == 130


@pytest.mark.parametrize("job", COMMANDS)
def test_help_and_wrong_flags_wait_for_no_heavy_import(job: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TELLS_MODULES)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{runs.ROOT}", "PYTHONWARNINGS": "ignore"}
    for options, code, said in ((["--help"], 0, "usage: "), (["--hlep"], 2, "error: unknown option --hlep")):
        command = [sys.executable, f"jobs/{job}.py", *options]
        before = os.times()
        done = subprocess.run(
            command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        seconds = os.times().children_user - before.children_user
        told, _, imported = (done.stdout + done.stderr).partition("modules: ")
        assert done.returncode == code
        assert told.startswith(said)
        assert HEAVY & set(imported.split()) == set()
        assert seconds < 1  # of the processor; 0.1 where nothing else runs


def test_what_is_left_out_is_told_shard_by_shard_and_counted_where_there_are_many(capsys: pytest.CaptureFixture[str]):
    assert print_left_out([]) == 0
    assert capsys.readouterr().err == ""
    assert print_left_out([LeftOut(700, f"{n}.tar: 700 not read") for n in range(7)]) == 4900
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == [f"warning: {n}.tar: 700 not read" for n in range(5)]
    assert lines[5:] == ["warning: 4,900 samples in 7 shards were not read"]
