"""JAX's own tests, by name: what passes on its CPU backend against what passes on ours.

    python tests/peers/jax_suite.py SOURCE OUT [FILE ...]

SOURCE is a checkout of JAX at the version installed (`git clone --branch jax-v0.10.2
https://github.com/jax-ml/jax`); the tests need `absl-py`, `hypothesis` and `pytest-timeout`, and
two of them SOURCE's jax/_src/hypothesis_test_util.py in the installed JAX. Every FILE of
SOURCE/tests (all, if none is named) runs on one rank with JAX's backend and with ours; a test that
differs runs once more on the inner plugin, registered without us. JAX's tests give its CPU backend
eight devices, and one rank has one: tests that skip for want of devices are counted. Results stay
in OUT, one JUnit file for each, and files that have one are not run again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path

# What JAX's tests say when they skip because there are too few devices.
FEW_DEVICES = re.compile(r"device", re.IGNORECASE)
FILE_LIMIT = 1500
TEST_LIMIT = 240


def inner_plugin() -> str:
    import xla_plugins.xla_cpu_pjrt as wheel

    return str(next(Path(folder) / "xla_cpu_pjrt.so" for folder in wheel.__path__))


def environment(backend: str) -> dict[str, str]:
    variables = {
        "JAX_PLATFORMS": backend,
        "JAX_NUM_GENERATED_CASES": os.environ.get("JAX_NUM_GENERATED_CASES", "2"),
        "JAX_TRACEBACK_FILTERING": "off",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if backend == "inner":
        variables["PJRT_NAMES_AND_LIBRARY_PATHS"] = f"inner:{inner_plugin()}"
    return os.environ | variables


def run(
    source: Path, out: Path, file: str, backend: str, tests: list[str] | None = None
) -> dict[str, str]:
    """The outcome of each test of `file`, or of those named; "lost" is one that never reported."""
    report = out / f"{file}.{backend}.xml"
    log = report.with_suffix(".log")
    if not report.exists():
        if backend == "inner" and tests is None:
            raise ValueError("the inner plugin is asked about named tests only")
        chosen = [f"tests/{file}"] if tests is None else tests
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
            *(f"--timeout={TEST_LIMIT}", f"--junitxml={report}", *chosen),
        ]
        with log.open("w") as output:
            try:
                subprocess.run(
                    command,
                    cwd=source,
                    env=environment(backend),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=FILE_LIMIT,
                )
            except subprocess.TimeoutExpired:
                output.write("\ntime limit of the file\n")
    return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test in a report."""
    if not report.exists():
        return {}
    found = {}
    for case in xml.parse(report).iter("testcase"):
        outcome = "passed"
        for kind in ("failure", "error", "skipped"):
            why = case.find(kind)
            if why is not None:
                few = kind == "skipped" and FEW_DEVICES.search(why.get("message", ""))
                outcome = "few devices" if few else kind
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = outcome
    return found


def compare(source: Path, out: Path, file: str) -> tuple[int, int, int]:
    """Prints what differs; returns how many pass on JAX's backend, on ours, and need devices."""
    theirs, ours = run(source, out, file, "cpu"), run(source, out, file, "mpi_cuda")
    passing = [test for test, outcome in theirs.items() if outcome == "passed"]
    wrong = [test for test in passing if ours.get(test, "lost") != "passed"]
    missing = [test for test in wrong if ours.get(test) != "few devices"]
    few = len(wrong) - len(missing)
    inner: dict[str, str] = {}
    if missing:
        inner = run(source, out, file, "inner", [f"tests/{file}::{test}" for test in missing])
    counts = len(passing), len(passing) - len(wrong), few
    print(summary(file, counts), flush=True)
    for test in missing:
        outcome, without_us = ours.get(test, "lost"), inner.get(test, "lost")
        print(f"  {test}: {outcome}, inner plugin: {without_us}", flush=True)
    return counts


def summary(what: str, counts: Sequence[int]) -> str:
    theirs, ours, few = counts
    return f"{what}: {theirs} pass on cpu, {ours} of them on mpi_cuda, {few} need more devices"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = arguments.files or sorted(
        path.name for path in (arguments.source / "tests").glob("*_test.py")
    )
    counts = [compare(arguments.source, out, file) for file in files]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    print(summary("all", totals))


if __name__ == "__main__":
    main()
