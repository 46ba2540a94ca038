"""JAX's own tests, by name: what passes on its CPU backend against what passes on ours.

    python tests/peers/jax_suite.py SOURCE OUT [FILE ...]

SOURCE is a checkout of JAX at the version installed (`git clone --branch jax-v0.10.2
https://github.com/jax-ml/jax`); the tests need `absl-py`, `hypothesis` and `pytest-timeout`. Every
FILE of SOURCE/tests (all, if none is named) runs on one rank with JAX's backend, of one device too,
and with ours; a test that differs runs once more on the inner plugin, registered without us.
Results stay in OUT, one JUnit file for each, and files that have one are not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

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
        "PYTHONPATH": os.pathsep.join(
            (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        ),
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
            *("-p", "one_device"),
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
    if not report.exists():
        return {}
    found = {}
    for case in xml.parse(report).iter("testcase"):
        bad = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = (
            bad[0] if bad else "passed"
        )
    return found


def compare(source: Path, out: Path, file: str) -> tuple[int, int]:
    """Prints what differs; returns how many pass on JAX's backend, and of those on ours."""
    theirs, ours = run(source, out, file, "cpu"), run(source, out, file, "mpi_cuda")
    passing = [test for test, outcome in theirs.items() if outcome == "passed"]
    missing = [test for test in passing if ours.get(test, "lost") != "passed"]
    inner: dict[str, str] = {}
    if missing:
        inner = run(source, out, file, "inner", [f"tests/{file}::{test}" for test in missing])
    print(
        f"{file}: {len(passing)} pass on cpu, {len(passing) - len(missing)} of them on mpi_cuda",
        flush=True,
    )
    for test in missing:
        print(
            f"  {test}: {ours.get(test, 'lost')}, inner plugin: {inner.get(test, 'lost')}",
            flush=True,
        )
    return len(passing), len(passing) - len(missing)


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
    theirs, ours = (sum(column) for column in zip(*counts, strict=True))
    print(f"{theirs} pass on cpu, {ours} of them on mpi_cuda")


if __name__ == "__main__":
    main()
