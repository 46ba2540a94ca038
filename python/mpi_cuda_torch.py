"""PyTorch/XLA: the ranks of the job are its devices, and the world of its collectives.

torch_xla loads this module by itself, as an entry point of the group `torch_xla.plugins`. Its
device is `PJRT_DEVICE=MPI`; JAX is not needed. Nothing changes for programs that use another one.

torch_xla asks for its world before each collective outside of its SPMD mode. A process that was not
started by `xmp.spawn` or `torchrun` has told it no devices, so the world is 1 and a collective
returns its input. A rank of a job tells its devices when it is asked first.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch_xla.experimental import plugins

LIBRARY = Path(__file__).resolve().parent / "mpi_cuda" / "lib" / "libpjrt_mpi_cuda.so"


class Plugin(plugins.DevicePlugin):
    """What torch_xla knows of the library. A launcher of MPI starts the processes, one for each
    device."""

    def library_path(self) -> str:
        """The file that torch_xla loads."""
        return str(LIBRARY)

    def configure_single_process(self) -> None:
        """Called by `xmp.spawn(nprocs=1)`; the launcher has decided."""

    def physical_chip_count(self) -> int:
        """How many processes `xmp.spawn` may start.

        Raises:
          RuntimeError: always, since a process that a rank starts cannot join the job.
        """
        raise RuntimeError(
            "mpi_cuda: the launcher starts the processes (mpirun -n N python ...), and xmp.spawn "
            "and torch_xla.launch would start others, which cannot join the job: call the function "
            "itself"
        )


def selected() -> bool:
    """Whether torch_xla's device is this library."""
    by_path = os.environ.get("PJRT_LIBRARY_PATH", "").endswith(LIBRARY.name)
    return xr.device_type() == "MPI" or (xr.device_type() == "LIBRARY" and by_path)


@functools.cache
def join() -> None:
    """Tells torch_xla the devices of this job, so that its collectives go over all ranks. In SPMD
    mode there is nothing to tell."""
    if not xr.is_spmd():
        xm.set_replication(torch_xla.device(), xm.get_xla_supported_devices())


def _install() -> None:
    original = xr.world_size

    @functools.wraps(original)
    def world_size(*arguments: Any, **options: Any) -> int:
        join()
        return original(*arguments, **options)

    xr.world_size = world_size


if selected():
    # Any thread of its pool launches, one launch after the other.
    os.environ.setdefault("MPI_CUDA_THREAD_ORDER", "one")
    _install()
