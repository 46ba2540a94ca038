"""Microseconds of one eager and one jitted call of 8 bytes, waited for; medians.

Usage: mpirun -n 2 python tests/bench/eager.py [mpi4jax]     (mpi4jax itself, executed by us)
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

SUM: Any
if "mpi4jax" in sys.argv:
    import mpi4jax as library
    from mpi4py.MPI import SUM
else:
    from mpi_cuda import SUM
    from mpi_cuda import notoken as library

x = jnp.ones(2)
eager = lambda x: library.allreduce(x, op=SUM)
for name, function in (("eager", eager), ("jitted", jax.jit(eager))):
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        function(x).block_until_ready()
        times.append((time.perf_counter() - start) * 1e6)
    if jax.process_index() == 0:
        print(f"{name} {sorted(times)[500]:.1f}", flush=True)
