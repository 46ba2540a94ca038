"""Whole jobs under both MPIs, with no variables set by hand."""

from __future__ import annotations

import os
import subprocess
import sys

MPIS = ["openmpi", "mpich"]
OWN = ("MPI_CUDA", "MPI4PY", "JAX", "PMI", "PMIX", "OMPI_COMM")


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
    return subprocess.run(
        [*launcher, sys.executable, "-c", code, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=limit,
    )


def twice(text: str, result: subprocess.CompletedProcess[str]) -> bool:
    """Whether both ranks printed that and nothing else; MPIs mix parts of the ranks' lines."""
    return sorted("".join(result.stdout.split())) == sorted("".join((text + text).split()))
