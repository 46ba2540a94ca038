"""The ranks of an MPI job as the devices of one JAX program.

Start a program with `mpirun -n N` and `JAX_PLATFORMS=mpi_cuda`. The operations here take and return
tokens; those of `mpi_cuda.notoken` do without. Importing this package initialises nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__version__ = "0.1.0"

try:
    import jax as _jax
except ModuleNotFoundError as missing:
    if missing.name != "jax":
        raise
    _words = (
        "mpi_cuda needs JAX, which is not installed for this Python: pip install jax; with XLA's "
        "CPU plugin, which CPU devices need: pip install jax xla-cpu-pjrt"
    )
    # What Python has there while it looks for the module of `-m`.
    if sys.argv[:2] == ["-m", "doctor"]:
        from mpi_cuda import _doctor

        sys.exit(_doctor.without_jax(_words))
    raise ImportError(_words) from None

if not hasattr(_jax, "__version__"):
    raise ImportError(
        f"`import jax` found {getattr(_jax, '__file__', None) or list(_jax.__path__)}, which is "
        "not JAX and hides it: rename it, or take its folder out of PYTHONPATH"
    )

from mpi_cuda import _jax_version

_jax_version.refuse_older(_jax.__version__)
try:
    from mpi_cuda import _derivatives, _jax_patches  # noqa: F401
except (AttributeError, ImportError) as error:
    raise _jax_version.does_not_fit(_jax.__version__, error) from error
from mpi_cuda import _library as _library
from mpi_cuda import experimental, notoken
from mpi_cuda._arguments import ANY_SOURCE, ANY_TAG, OPS, PROC_NULL, Comm, Op, Status
from mpi_cuda._arguments import resolve_comm as as_comm
from mpi_cuda._halo import halo_exchange
from mpi_cuda._neighbors import neighbor_allgather, neighbor_alltoall
from mpi_cuda._nonblocking import Request, irecv, isend, wait
from mpi_cuda._nonblocking_collectives import (
    iallgather,
    iallreduce,
    ialltoall,
    ibarrier,
    ibcast,
    iexscan,
    igather,
    ireduce,
    ireduce_scatter,
    iscan,
    iscatter,
)
from mpi_cuda._operations import (
    allgather,
    allreduce,
    alltoall,
    barrier,
    bcast,
    create_token,
    exscan,
    gather,
    recv,
    reduce,
    reduce_scatter,
    scan,
    scatter,
    send,
    sendrecv,
    sendrecv_replace,
)
from mpi_cuda._stop import request_stop, stop_on, stop_requested
from mpi_cuda._vector import allgatherv, alltoallv, gatherv, scatterv

SUM = OPS["SUM"]
PROD = OPS["PROD"]
MIN = OPS["MIN"]
MAX = OPS["MAX"]
LAND = OPS["LAND"]
LOR = OPS["LOR"]
LXOR = OPS["LXOR"]
BAND = OPS["BAND"]
BOR = OPS["BOR"]
BXOR = OPS["BXOR"]

_COMMUNICATORS = {"COMM_WORLD": _library.WORLD_NUMBER, "COMM_SELF": _library.SELF_NUMBER}

_jax_patches.install("import")


def __getattr__(name: str) -> Any:
    """`COMM_WORLD` and `COMM_SELF`, which join the MPI world when they are first used."""
    if name in _COMMUNICATORS:
        from mpi_cuda._arguments import world_comm

        return world_comm(_COMMUNICATORS[name])
    raise AttributeError(f"module 'mpi_cuda' has no attribute {name!r}")


def has_cuda_support() -> bool:
    """Whether arrays are on a CUDA device here (`MPI_CUDA_DEVICE`); they are communicated."""
    return bool(_library.load().mpi_cuda_on_gpu())


def write_record(path: str | os.PathLike[str] | None = None) -> None:
    """Writes the record of this rank's last operations, which `python -m mpi_cuda report` reads.

    Args:
      path: the file; by default this rank's in `MPI_CUDA_RECORD_DIR`, which then stays.

    Raises:
      RuntimeError: it cannot be written, or no file is named and the variable is not set.
    """
    name = None if path is None else os.fsencode(path)
    if _library.load().mpi_cuda_write_record(name):
        raise RuntimeError(_library.last_error())


def has_sycl_support() -> bool:
    """Whether this build communicates SYCL arrays; mpi4jax's name, and it does not."""
    return False


__all__ = [
    "ANY_SOURCE",
    "ANY_TAG",
    "BAND",
    "BOR",
    "BXOR",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MIN",
    "PROC_NULL",
    "PROD",
    "SUM",
    "Comm",
    "Op",
    "Request",
    "Status",
    "allgather",
    "allgatherv",
    "allreduce",
    "alltoall",
    "alltoallv",
    "as_comm",
    "barrier",
    "bcast",
    "create_token",
    "experimental",
    "exscan",
    "gather",
    "gatherv",
    "halo_exchange",
    "has_cuda_support",
    "has_sycl_support",
    "iallgather",
    "iallreduce",
    "ialltoall",
    "ibarrier",
    "ibcast",
    "iexscan",
    "igather",
    "irecv",
    "ireduce",
    "ireduce_scatter",
    "iscan",
    "iscatter",
    "isend",
    "neighbor_allgather",
    "neighbor_alltoall",
    "notoken",
    "recv",
    "reduce",
    "reduce_scatter",
    "request_stop",
    "scan",
    "scatter",
    "scatterv",
    "send",
    "sendrecv",
    "sendrecv_replace",
    "stop_on",
    "stop_requested",
    "wait",
    "write_record",
]
