"""A rank that fails before MPI has begun there ends its job.

Open MPI's launcher and Slurm do that. MPICH's `mpirun` (Hydra) waits for such a rank as if it
could still come, while the others wait in MPI_Init. So the rank tells the launcher by PMI-1's
`abort`, the message that MPI_Abort sends (MPICH, `src/pmi`).

Loaded when a rank fails, without the package, which imports JAX.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat
import sys
import time
from pathlib import Path

#: How much of an answer of the launcher's is read, and for how many seconds it may take.
_ANSWER, _LIMIT = 1024, 1.0
#: Seconds in which the launcher reads what this rank has printed; then it kills all ranks.
_READ = 0.3


def end_job() -> None:
    """Ends the job, if MPI has not begun here and Hydra is this process's parent."""
    connection = int(os.environ.get("PMI_FD", "-1"))
    if not _is_ours(connection) or _has_mpi_begun():
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    time.sleep(_READ)
    os.write(connection, b"cmd=init pmi_version=1 pmi_subversion=1\n")
    if select.select([connection], [], [], _LIMIT)[0]:
        os.read(connection, _ANSWER)
    os.write(connection, b"cmd=abort exitcode=1\n")


def _is_ours(connection: int) -> bool:
    """Whether that is Hydra's end, and not what a child of a rank has by the number."""
    parent = Path(f"/proc/{os.getppid()}/comm").read_text()
    return parent.startswith("hydra_pmi") and stat.S_ISSOCK(os.fstat(connection).st_mode)


def _has_mpi_begun() -> bool:
    """Whether a library of this process says so, or may have."""
    begun = ctypes.c_int(0)
    for row in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        path = "/" + row.partition("/")[2]
        if "libmpi" not in os.path.basename(path):
            continue
        try:
            library = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            # Another file is there by now.
            return True
        if hasattr(library, "MPI_Initialized"):
            library.MPI_Initialized(ctypes.byref(begun))
        if begun.value:
            return True
    return False
