"""The MPI: which file, who named it, who started the job, and whether mpi4py uses the same."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mpi_cuda import _library
from mpi_cuda._doctor import launched
from mpi_cuda._doctor.finding import Facts, Finding, note, of_error, problem

#: How the files of MPIs are called (`mpi_runtime/src/mpi/family.rs`).
NAMES = (
    "libmpi.so.40",
    "libmpi.so.12",
    "libmpich.so.12",
    "libmpi_cray.so.12",
    "libmpi_abi.so.1",
    "libmpi_abi.so.0",
)
#: What mpi4py ends up with, in a process of its own, which initialises no MPI.
MPI4PY = """
import json, os
found = {}
try:
    import mpi4py
    found["version"] = mpi4py.__version__
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI
    found["module"] = MPI.__file__
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
lines = [line.split(None, 5) for line in open("/proc/self/maps").read().splitlines()]
files = {line[5] for line in lines if len(line) > 5 and line[5].startswith("/")}
found["loaded"] = sorted(map(os.path.realpath, files))
print(json.dumps(found))
"""
LIMIT = 30


def begin_mpi4py() -> subprocess.Popen[str] | None:
    """Asks mpi4py which MPI it uses, on the first rank of a node, if it is installed."""
    if not launched.is_first_here() or importlib.util.find_spec("mpi4py") is None:
        return None
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", MPI4PY], stdout=pipe, stderr=pipe, text=True)


def end_mpi4py(asked: subprocess.Popen[str] | None) -> Facts | None:
    """What it said."""
    if asked is None:
        return None
    try:
        out, errors = asked.communicate(timeout=LIMIT)
        found = json.loads(out.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        asked.kill()
        return {"error": f"it ended with status {asked.returncode}: {errors[-300:]}"}
    of_us = str(_library.FOLDER)
    mpis = [file for file in found.pop("loaded") if _is_mpi(file) and not file.startswith(of_us)]
    return {**found, "files": mpis}


def _is_mpi(file: str) -> bool:
    name = os.path.basename(file)
    return any(name == one or name.startswith(f"{one}.") for one in NAMES)


def collect(about: dict[str, str]) -> Facts:
    """Facts of this process."""
    names = ("file", "abi", "by", "doubt", "version")
    variables = ("MPI_CUDA_LIBMPI", "MPI_CUDA_MPI", "MPI4PY_LIBMPI", "MPI4PY_MPIABI")
    return {
        **{name: about.get(f"mpi_{name}") for name in names},
        "launcher": about.get("launcher"),
        "launched": int(about.get("launched", 1)),
        "thread_level": about.get("thread_level"),
        "variables": {name: os.environ[name] for name in variables if name in os.environ},
        "library_path": _library_path(),
        "start_up": "mpi_cuda_startup" in sys.modules,
    }


def describe(facts: Facts) -> Iterator[tuple[str, str]]:
    """Lines of the report."""
    if facts["file"] is None:
        # If it does not start, why is among the problems.
        yield "MPI", "none was opened" if facts.get("error") else "none, so there is one rank"
    else:
        version = f"{facts['version'].split(',')[0]}, " if facts["version"] else ""
        yield "MPI", f"{version}{facts['file']} ({facts['by']}; ABI {facts['abi']})"
    if facts["variables"]:
        yield "", ", ".join(f"{name}={value}" for name, value in facts["variables"].items())
    if facts["launcher"]:
        yield "launcher", f"{facts['launcher']}, {facts['launched']} rank(s)"
    else:
        named = launched.named()
        yield (
            "launcher",
            f"one, by {named}" if named else "none: this process was started by itself",
        )
    if facts["thread_level"]:
        yield "thread level", facts["thread_level"]
    mpi4py = facts.get("mpi4py")
    if mpi4py and not mpi4py.get("error"):
        files = mpi4py["files"]
        same = "the same MPI" if files == [_real(facts["file"])] else ", ".join(files)
        yield "mpi4py", f"{mpi4py['version']}, uses {same or 'no MPI that can be told'}"


def check(facts: Facts) -> Iterator[Finding]:
    """Findings of one rank."""
    if facts.get("error"):
        yield of_error(facts["error"])
    if facts["doubt"]:
        yield of_error(facts["doubt"])._replace(is_problem=False)
    yield from _check_mpi4py(facts, facts.get("mpi4py") or {})
    for file, wrong in facts["library_path"].items():
        if wrong == "no such folder":
            yield note(f"LD_LIBRARY_PATH has {file}, which is no folder", "take it out")
        elif wrong:
            yield problem(
                f"LD_LIBRARY_PATH is broken: {file} {wrong}, and hides the real one",
                "take its folder out of LD_LIBRARY_PATH",
            )
        elif facts["file"] and os.path.realpath(file) != _real(facts["file"]):
            yield note(
                f"LD_LIBRARY_PATH has another MPI, {file}, than the one in use",
                "take its folder out if programs fail at random, or set MPI_CUDA_LIBMPI",
            )


def _check_mpi4py(facts: Facts, mpi4py: Facts) -> Iterator[Finding]:
    if facts.get("error") and mpi4py.get("error"):
        # It has met the same.
        return
    if mpi4py.get("error"):
        named = [name for name in facts["variables"] if name.startswith("MPI4PY")]
        yield problem(
            f"mpi4py {mpi4py.get('version', '')} cannot be imported: {mpi4py['error']}",
            f"unset {' and '.join(named)}"
            if named
            else "pip install --force-reinstall mpi4py, or build it against this MPI",
        )
    elif facts["file"] and mpi4py.get("files", []) not in ([], [_real(facts["file"])]):
        start_up = "have mpi_cuda_startup imported when Python starts (its .pth file)"
        yield problem(
            f"mpi4py uses {' and '.join(mpi4py['files'])}, and mpi_cuda {facts['file']}: one "
            "process can use only one MPI",
            "unset MPI4PY_LIBMPI and MPI4PY_MPIABI, or install mpi4py for this MPI"
            if facts["start_up"]
            else f"{start_up}, which lets mpi4py find this MPI",
        )


def _real(file: str | None) -> str | None:
    return file and os.path.realpath(file)


def _library_path() -> dict[str, str | None]:
    """The MPIs in `LD_LIBRARY_PATH`, and what is wrong with them or with their folders."""
    found: dict[str, str | None] = {}
    for entry in re.split("[:;]", os.environ.get("LD_LIBRARY_PATH", "")):
        if entry and not os.path.isdir(entry):
            found[entry] = "no such folder"
        for name in NAMES if entry else ():
            file = Path(entry) / name
            if file.is_file():
                found[str(file)] = _wrong_with(file)
            elif file.is_symlink():
                found[str(file)] = "points to nothing"
    return found


def _wrong_with(file: Path) -> str | None:
    """Whether the dynamic loader can take a file (elf(5)): its kind, and the processor's."""
    try:
        with file.open("rb") as library, open("/proc/self/exe", "rb") as own:
            theirs, ours = library.read(20), own.read(20)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if theirs[:4] != b"\x7fELF":
        return "is no library"
    # The width of addresses and their order, and the processor.
    return None if theirs[4:6] + theirs[18:] == ours[4:6] + ours[18:] else "is another processor's"
