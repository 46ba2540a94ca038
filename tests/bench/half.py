"""Gigabytes per second of allreduce SUM by dtype, inside one jitted loop.

Usage: mpirun -n 2 python tests/bench/half.py [BYTES...]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import notoken as nt

TIMES = 20

for size in map(int, sys.argv[1:] or ["65536", "1048576", "16777216"]):
    for dtype in ("float32", "bfloat16", "float16"):
        kind = jnp.dtype(dtype)
        x = jnp.ones(size // kind.itemsize, kind)

        @jax.jit
        def loop(x):
            def body(_, total):
                return total + nt.allreduce(x, m.SUM)[0]

            return jax.lax.fori_loop(0, TIMES, body, jnp.zeros((), x.dtype))

        loop(x).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            loop(x).block_until_ready()
            times.append(time.perf_counter() - start)
        if m.COMM_WORLD.rank == 0:
            rate = size * TIMES / sorted(times)[2] / 1e9
            print(f"{dtype:9} {size:9} bytes: {rate:6.2f} GB/s", flush=True)
