"""Whole jobs under both MPIs, with no variables set by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MPIS = ["openmpi", "mpich"]

OWN = ("MPI_CUDA", "MPI4PY", "JAX", "PMI", "PMIX", "OMPI_COMM")

#: Whether what runs under one MPI is to run under the other one.
OTHER = "TEST_OTHER_MPI" in os.environ


def on_one(mpi: str) -> pytest.MarkDecorator:
    """Runs a test under that MPI alone: one in which no MPI has a part."""
    return pytest.mark.parametrize("mpi", [MPIS[MPIS.index(mpi) ^ OTHER]])


def in_turn(*cases: Any) -> list[tuple]:
    """The arguments of each case behind one of the MPIs, now this and now that one: for what no MPI
    has a part in."""
    arguments = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [(MPIS[number % len(MPIS)], *own) for number, own in enumerate(arguments, OTHER)]


def environment(**variables: str) -> dict[str, str]:
    """That of a user who set nothing but the platform."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
    return own | {"JAX_PLATFORMS": "mpi_cuda", **variables}


def job(
    mpi: str | None,
    code: str,
    *arguments: str,
    ranks: int = 2,
    limit: float = 60,
    options: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` on some ranks, with options of the launcher."""
    launcher = [] if mpi is None else [f"mpirun.{mpi}", *options, "-n", str(ranks)]
    command = [*launcher, sys.executable, "-c", code, *arguments]
    result = _run(command, environment(**variables), limit, bool(launcher))
    if result is None:
        result = _run(command, environment(**variables), limit, bool(launcher))
        assert result is not None, "the launcher has failed twice when its ranks had ended"
    return result


def _run(
    command: list[str], variables: dict[str, str], limit: float, launched: bool
) -> subprocess.CompletedProcess[str] | None:
    """Runs a job; none if its launcher has failed, and not its ranks.

    When a rank aborts while another one is in MPI_Finalize, the launcher of Open MPI 4.1.4
    sometimes crashes, or waits for itself in PMIx_server_finalize: 3 times in 61 on a busy machine.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            ended = _have_ended(process.pid)
            process.kill()
            if launched and ended:
                return None
            raise
        if launched and process.returncode == -signal.SIGSEGV:
            return None
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _have_ended(launcher: int) -> bool:
    """Whether the processes that the launcher has started have all ended."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    # The state stands behind the name of the program, which is in brackets.
    stats = [Path(f"/proc/{child}/stat").read_text() for child in children]
    return bool(stats) and all(stat.rpartition(")")[2].split()[0] == "Z" for stat in stats)


def twice(text: str, result: subprocess.CompletedProcess[str]) -> bool:
    """Whether both ranks printed that and nothing else; MPIs mix parts of the ranks' lines."""
    return sorted("".join(result.stdout.split())) == sorted("".join((text + text).split()))
