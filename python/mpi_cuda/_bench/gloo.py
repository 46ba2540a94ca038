"""JAX's own CPU backend with gloo, in processes of its own: a process of JAX's has one backend.

Each rank starts one, at its own cores and without the launcher's variables. They meet at a port of
the first rank's, measure the same problems by the same method (`timing.py`), and end. The ranks
wait meanwhile without using their cores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mpi_cuda import _library
from mpi_cuda._bench.operations import OPERATIONS, Problem
from mpi_cuda._bench.plan import Plan
from mpi_cuda._bench.timing import Timing
from mpi_cuda._doctor import world

#: Seconds after which the processes are ended.
LIMIT = 600
#: Variables by which launchers tell a process that it is a rank.
OF_LAUNCHERS = ("MPI_", "OMPI_", "PMI", "PRTE_", "SLURM_", "JAX_")


def environment() -> dict[str, str]:
    """That of a process which is no rank, with this package."""
    own = {name: text for name, text in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    packages = [str(Path(__file__).parents[2]), *filter(None, [own.get("PYTHONPATH")])]
    return own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(packages)}


def _address() -> str:
    """Where this rank's process can listen."""
    several = bool(_library.load().mpi_cuda_several_nodes())
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    return f"{socket.gethostname() if several else '127.0.0.1'}:{port}"


def measure(wanted: Plan, rank: int, size: int) -> tuple[dict[Problem, Timing], str | None]:
    """Collective: on rank 0 the times of what JAX has collectives for, and on all ranks what went
    wrong, if anything."""
    names = [name for name in wanted.operations if OPERATIONS[name].native]
    problems = [one for name in names for one in wanted.problems(name, size)]
    address = world.gather(_address() if rank == 0 else "", size)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        spec = {
            "address": address,
            "rank": rank,
            "size": size,
            "problems": [[one.name, one.count] for one in problems],
            "dtype": wanted.dtype.name,
            "launch": wanted.launch,
            "how": wanted.how,
            "file": str(file),
        }
        told = world.gather(_run(spec), size)
        if failed := [f"rank {number}: {words}" for number, words in enumerate(told) if words]:
            return {}, failed[0]
        if rank:
            return {}, None
        rows: list[Any] = json.loads(file.read_text())
    return {one: Timing(*row) for one, row in zip(problems, rows, strict=True)}, None


def _run(spec: dict[str, Any]) -> str:
    """Runs this rank's process; what went wrong."""
    command = [sys.executable, "-m", "mpi_cuda._bench.child", json.dumps(spec)]
    # The child ends when this end of its input is closed, however this process ends.
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, env=environment(), stdin=pipe, stdout=nothing, stderr=errors
        )
        try:
            status = child.wait(LIMIT)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"its process was still at work after {LIMIT} s"
        finally:
            if child.stdin:
                child.stdin.close()
        if status == 0:
            return ""
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    said = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
    return f"its process ended with status {status}: {said[-1].strip()[:300]}"
