"""One rank of one of JAX's own tests for several processes: `mpirun -n N python ... FILE PORT`.

With PORT 0 JAX is not told of its processes (no `jax.distributed`), as users start mpi_cuda.
"""

from __future__ import annotations

import os
import runpy
import sys

from mpi4py import MPI

file, port = sys.argv[1:3]
rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
if port == "0":
    from jax._src import distributed

    distributed.initialize = lambda *_, **__: None
sys.path.insert(0, os.path.dirname(file))
sys.argv = [
    file,
    f"--num_processes={size}",
    f"--multiprocess_test_worker_id={rank}",
    f"--multiprocess_test_controller_address=localhost:{port}",
    "--heartbeat_timeout=60",
    "--initialization_timeout=60",
    *sys.argv[3:],
]
runpy.run_path(file, run_name="__main__")
