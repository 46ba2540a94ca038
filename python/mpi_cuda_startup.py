"""Runs when Python starts in our virtual environment: tells mpi4py which MPI launched us.

mpi4py's wheel serves several MPIs and, where more than one is installed, takes the first it finds;
the wrong one sees a world of size 1. Nothing is imported or initialised here, and nothing happens
without an MPI launcher or where the user chose (`MPI4PY_LIBMPI`, `MPI4PY_MPIABI`).
"""

import os


def _select() -> None:
    environment = os.environ
    if "MPI4PY_LIBMPI" in environment or "MPI4PY_MPIABI" in environment:
        return
    if "OMPI_COMM_WORLD_SIZE" in environment or "PMIX_RANK" in environment:
        environment["MPI4PY_LIBMPI"] = "libmpi.so.40"
    elif "PMI_SIZE" in environment:
        library = os.path.join(
            os.path.dirname(os.path.abspath(__file__)), "mpi_cuda", "lib", "mpi4py", "libmpi.so.12"
        )
        if os.path.exists(library):
            environment["MPI4PY_LIBMPI"] = library


_select()
