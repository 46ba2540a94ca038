"""Milliseconds of a rank's own work by the size of the world, whose ranks need not be there: XLA's
pool for the CPU has a thread for each core of the process, or for each device of its client if
those are more.

JAX_PLATFORMS=mpi_cuda MPI_CUDA_PRETEND_SIZE=64 taskset -c 0 python pool.py
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp

PROGRAMS = {
    "product": lambda a: a @ a,
    "element by element": lambda a: jnp.tanh(a) * a + a,
    "sum": lambda a: a.sum(0),
}


def main() -> None:
    own = jax.local_devices()[0]
    for size in (256, 1024):
        a = jax.device_put(jnp.ones((size, size), device=own), own)
        for name, program in PROGRAMS.items():
            jitted, times = jax.jit(program), []
            jitted(a).block_until_ready()
            for _ in range(20):
                start = time.perf_counter()
                jitted(a).block_until_ready()
                times.append(time.perf_counter() - start)
            print(f"{name} of {size} x {size}: {min(times) * 1e3:.3f}")
    print(f"{len(list(Path('/proc/self/task').iterdir()))} threads")


if __name__ == "__main__":
    main()
