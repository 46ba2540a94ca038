"""Launches say from which line of the user's program they come, where records are written.

JAX tells the plugin when it is asked to, which costs each launch under a microsecond. Lines of this
package are not the user's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax._src.lib import _jax

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="lines of this package are not taken for the user's",
        used=("lib._jax.add_exclude_path",),
        without="a warning where records are written; they have no lines, or this package's",
        test="test_a_rank_that_raises_and_one_that_waits",
    ),
)

_OPTION = "jax_send_traceback_to_runtime"


def install() -> None:
    """Asks JAX for the lines, unless the user has."""
    if not os.environ.get("MPI_CUDA_RECORD_DIR"):
        return
    module: Any = _jax
    current = getattr(jax.config, _OPTION, None)
    if current is None or not hasattr(module, "add_exclude_path"):
        _library.warn(
            "with this version of JAX, records (MPI_CUDA_RECORD_DIR) do not have the "
            "lines of Python that launched what is in them",
        )
        return
    module.add_exclude_path(str(Path(__file__).resolve().parents[1]))
    if getattr(current, "name", current) == "OFF":
        jax.config.update(_OPTION, "on")
