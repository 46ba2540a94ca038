"""One rank of one of JAX's own tests for several processes; see tests/peers/jax_multiprocess.

Arguments: the test's file, a free port for JAX's coordinator (where the tests wait for each
other), and where rank 0 writes what it prints.
"""

from __future__ import annotations

import os
import runpy
import sys

from mpi4py import MPI

file, port, log = sys.argv[1:4]
rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
if rank == 0:
    sys.stderr.flush()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
sys.path.insert(0, os.path.dirname(file))
sys.argv = [
    file,
    f"--num_processes={size}",
    f"--multiprocess_test_worker_id={rank}",
    f"--multiprocess_test_controller_address=localhost:{port}",
    "--heartbeat_timeout=60",
    "--initialization_timeout=60",
    *sys.argv[4:],
]
runpy.run_path(file, run_name="__main__")
