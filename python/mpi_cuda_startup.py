"""Runs when Python starts in our virtual environment. Nothing is imported or initialised here.

It tells mpi4py which MPI launched us: mpi4py's wheel serves several MPIs and, where more than one
is installed, takes the first it finds; the wrong one sees a world of size 1. Nothing happens
without an MPI launcher or where the user chose (`MPI4PY_LIBMPI`, `MPI4PY_MPIABI`).

And where the backend mpi_cuda is selected, an `import mpi4jax` gets our bridge instead of its own
(`mpi_cuda/_mpi4jax.py`).
"""

import os
import sys


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


class _Bridge:
    """Finds our module where mpi4jax imports its bridge."""

    PACKAGE = "mpi4jax._src.xla_bridge."

    @staticmethod
    def _selected() -> bool:
        jax = sys.modules.get("jax")
        platforms = getattr(getattr(jax, "config", None), "jax_platforms", None)
        if platforms is None:
            platforms = os.environ.get("JAX_PLATFORMS", "")
        return "mpi_cuda" in platforms.split(",")

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if not name.startswith(cls.PACKAGE) or not cls._selected():
            return None
        from importlib.util import spec_from_file_location

        if name != f"{cls.PACKAGE}mpi_xla_bridge_cpu":
            raise ImportError(f"{name} is not used with the backend mpi_cuda")
        folder = os.path.dirname(os.path.abspath(__file__))
        return spec_from_file_location(name, os.path.join(folder, "mpi_cuda", "_mpi4jax.py"))


_select()
sys.meta_path.insert(0, _Bridge)
