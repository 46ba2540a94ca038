"""A rank that fails before MPI has begun there ends its job.

Open MPI's launcher and Slurm do that. MPICH's `mpirun` (Hydra) waits for such a rank as if it
could still come, while the others wait in MPI_Init. So the rank tells the launcher by PMI-1's
`abort`, the message that MPI_Abort sends (MPICH, `src/pmi`).

Loaded when a rank fails, without the package, which imports JAX.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

#: How much of an answer of the launcher's is read.
_ANSWER = 1024


def end_job() -> None:
    """Ends the job, if MPI has not begun here and Hydra is this process's parent."""
    connection = int(os.environ.get("PMI_FD", "-1"))
    if not _is_ours(connection) or _has_mpi_begun():
        return
    os.write(connection, b"cmd=init pmi_version=1 pmi_subversion=1\n")
    os.read(connection, _ANSWER)
    os.write(connection, b"cmd=abort exitcode=1\n")


def _is_ours(connection: int) -> bool:
    """Whether that is Hydra's end, and not what a child of a rank has by the number."""
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text()
        return parent.startswith("hydra_pmi") and stat.S_ISSOCK(os.fstat(connection).st_mode)
    except OSError:
        return False


def _has_mpi_begun() -> bool:
    """Whether a library of this process says so."""
    begun = ctypes.c_int(0)
    for row in Path("/proc/self/maps").read_text().splitlines():
        path = row.partition("/")[2]
        if "libmpi" not in os.path.basename(path):
            continue
        try:
            library = ctypes.CDLL(f"/{path}", os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.MPI_Initialized(ctypes.byref(begun))
        except (OSError, AttributeError):
            continue
        if begun.value:
            return True
    return False
