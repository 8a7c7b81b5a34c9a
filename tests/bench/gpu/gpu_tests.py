"""Step 1: the tests that need a GPU; in a rehearsal they run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from rows import ROOT, told


def main() -> int:
    task = told()
    report = task.work / "report.xml"
    options = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
    options += ["--continue-on-collection-errors"]  # of a module that lacks a library; the others still say something
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, "GPU_TESTS_DEVICE": task.device},
        check=False,
    )
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    broken = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    task.row("passed", int(suite.attrib["tests"]) - broken - skipped, "tests")
    task.row("failed", broken, "tests")
    for case in suite.iter("testcase"):
        for outcome in (*case.iter("failure"), *case.iter("error"), *case.iter("skipped")):
            task.row(case.attrib["name"], outcome.tag, "", outcome.attrib.get("message", "")[:160].replace("\n", " "))
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
