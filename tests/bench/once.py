"""Microseconds of one jitted operation and waiting for it, called again and again.

Usage, under mpirun: once.py OPERATION BYTES CALLS. Prints the best and the median of 7 series,
and of the best the page faults and the times the process gave up its core, for each call.
"""

from __future__ import annotations

import resource
import sys
import time

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
OPERATIONS = {
    "allgather": nt.allgather,
    "allreduce": lambda x: nt.allreduce(x, m.SUM),
    "alltoall": nt.alltoall,
    "sendrecv": lambda x: nt.sendrecv(x, x, (RANK - 1) % SIZE, (RANK + 1) % SIZE),
}


def main() -> None:
    name, size, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    function = jax.jit(OPERATIONS[name])
    x = jnp.ones((SIZE, size // 4 // SIZE), jnp.float32)
    if name == "allgather":
        x = x[0]
    for _ in range(20):
        function(x).block_until_ready()
    series = []
    for _ in range(7):
        nt.barrier()
        jax.effects_barrier()
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(calls):
            function(x).block_until_ready()
        elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        faults = (after.ru_minflt - before.ru_minflt) / calls
        switches = (after.ru_nvcsw - before.ru_nvcsw) / calls
        series.append((elapsed / calls * 1e6, faults, switches))
    series.sort()
    if RANK == 0:
        best, faults, switches = series[0]
        print(
            f"{name} of {size} bytes: {best:.1f} us at best, {series[3][0]:.1f} median; "
            f"{faults:.1f} page faults and {switches:.1f} waits a call",
            flush=True,
        )


if __name__ == "__main__":
    main()
