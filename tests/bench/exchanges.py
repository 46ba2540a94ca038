"""Microseconds of a sendrecv around a ring in a jitted loop of 500: the least of many launches,
which other programs of the machine disturb least.

Usage: mpirun -n RANKS python exchanges.py BYTES [LAUNCHES]
With PYTHONPATH at the `python` of another checkout it measures that one; take turns.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp

from mpi_cuda import COMM_WORLD
from mpi_cuda import notoken as nt

LOOP = 500
RANK, SIZE = COMM_WORLD.rank, COMM_WORLD.size
BYTES = int(sys.argv[1])
LAUNCHES = int(sys.argv[2]) if len(sys.argv) > 2 else 3000


@jax.jit
def ring(x: jax.Array) -> jax.Array:
    def step(_, y):
        return nt.sendrecv(y, y, source=(RANK - 1) % SIZE, dest=(RANK + 1) % SIZE)

    return jax.lax.fori_loop(0, LOOP, step, x)


def main() -> None:
    x = jnp.zeros(BYTES // 4, jnp.float32)
    times = []
    for _ in range(LAUNCHES + 1):
        start = time.perf_counter()
        ring(x).block_until_ready()
        times.append(time.perf_counter() - start)
    if RANK == 0:
        print(f"{min(times) / LOOP * 1e6:.3f}")


if __name__ == "__main__":
    main()
