"""Microseconds per operation through JAX, by size: one jitted call ("once"), inside a jitted loop
of 100 ("loop", a launch included; of 10 above 16 MiB), and for small messages inside one of 10000
("steady").

Usage: mpirun -n 2 python loop.py ours|mpi4jax OPERATION BYTES...
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp

LIBRARY, OPERATION = sys.argv[1:3]
if LIBRARY == "ours":
    from mpi_cuda import COMM_WORLD, SUM
    from mpi_cuda import notoken as mpi

    RANK, SIZE = COMM_WORLD.rank, COMM_WORLD.size
else:
    import mpi4jax as mpi
    from mpi4py.MPI import COMM_WORLD, SUM

    RANK, SIZE = COMM_WORLD.Get_rank(), COMM_WORLD.Get_size()


def operation(x: jax.Array) -> jax.Array:
    """One operation."""
    if OPERATION == "allreduce":
        return mpi.allreduce(x, op=SUM)
    if OPERATION == "sendrecv":
        return mpi.sendrecv(x, x, source=(RANK - 1) % SIZE, dest=(RANK + 1) % SIZE)
    if OPERATION == "allgather":
        return mpi.allgather(x)
    return mpi.alltoall(x.reshape(SIZE, -1)).reshape(x.shape)


@jax.jit
def once(x: jax.Array) -> jax.Array:
    return operation(x)


@functools.partial(jax.jit, static_argnums=1)
def repeat(x: jax.Array, times: int) -> jax.Array:
    # The operand is the same every time, as in C; the operations' order is kept anyway.
    def body(_, y):
        z = operation(x)
        return y + z.reshape(-1)[0]

    return jax.lax.fori_loop(0, times, body, jnp.float32(0))


def measure(function, x: jax.Array, count: int) -> float:
    # As many before: MPI maps its own memory with the first large messages, and ranks get in step.
    for _ in range(count):
        function(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(count):
        function(x).block_until_ready()
    return (time.perf_counter() - start) / count * 1e6


for size in map(int, sys.argv[3:]):
    x = jnp.ones(size // 4, jnp.float32)
    count = 400 if size <= 65536 else 100 if size <= 1 << 20 else 20 if size <= 1 << 24 else 3
    single = measure(once, x, count)
    if RANK == 0:
        print(f"once {size} {single:.3f}", flush=True)
    # Large messages in a shorter loop, whose launch costs them nothing.
    times = 100 if size <= 1 << 24 else 10
    # The first hundred are not measured: ranks that have just compiled are not in step yet.
    loops = count if size <= 65536 else 10 if size <= 1 << 20 else 2
    inside = measure(lambda x, times=times: repeat(x, times), x, loops) / times
    if RANK == 0:
        print(f"loop {size} {inside:.3f}", flush=True)
    if size <= 65536:
        steady = measure(lambda x: repeat(x, 10000), x, 2) / 10000
        if RANK == 0:
            print(f"steady {size} {steady:.3f}", flush=True)
