"""Microseconds per jitted call of one 8-byte allreduce, by how JAX is told of the order.

Usage: [mpirun -n 2] python tests/bench/order.py hidden|visible. "hidden" is what the package does;
"visible" leaves the ordered effect to JAX's own dispatch.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import _jax_patches

if sys.argv[1] == "visible":
    _jax_patches.INSTALLED["operation"] = ()

program = jax.jit(lambda x: m.notoken.allreduce(x, m.SUM))
x = jnp.ones(2)
for _ in range(500):
    y = program(x)
y.block_until_ready()
times = []
for _ in range(9):
    start = time.perf_counter()
    for _ in range(1000):
        y = program(x)
        y.block_until_ready()
    times.append((time.perf_counter() - start) / 1000 * 1e6)
if m.COMM_WORLD.rank == 0:
    print(f"{sys.argv[1]} on {m.COMM_WORLD.size} ranks: {sorted(times)[4]:.1f} us per call")
