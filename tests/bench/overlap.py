"""How much of a message is hidden behind computation between its start and its end.

Usage: mpirun -n 2 python overlap.py [MIB...]
Milliseconds: the exchange alone, the computation alone, one after the other (sendrecv, compute),
and overlapped (isend and irecv, compute, wait). Only a message that is on its way without the
processor can be hidden: over a network, not through shared memory.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from mpi_cuda import COMM_WORLD
from mpi_cuda import notoken as mpi

RANK, SIZE = COMM_WORLD.rank, COMM_WORLD.size
OTHER = RANK ^ 1


def compute(a: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 80, lambda _, a: jnp.tanh(a @ a), a)


@jax.jit
def exchange(x, a):
    return mpi.sendrecv(x, x, OTHER, OTHER)


@jax.jit
def work(x, a):
    return compute(a)


@jax.jit
def in_turn(x, a):
    return mpi.sendrecv(x, x, OTHER, OTHER), compute(a)


@jax.jit
def start(x):
    coming = mpi.irecv(x, OTHER)
    return mpi.isend(x, OTHER), coming


@jax.jit
def finish(going, coming):
    mpi.wait(going)
    return mpi.wait(coming)


def overlapped(x, a):
    requests = start(x)
    y = work(x, a)
    return finish(*requests), y


def median(function, *args) -> float:
    times = []
    for _ in range(15):
        mpi.barrier()
        jax.effects_barrier()
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[5:]) * 1e3


a = jnp.ones((256, 256)) / 256
for size in map(int, sys.argv[1:] or ["1"]):
    x = jnp.ones(size << 18, jnp.float32)
    row = [median(f, x, a) for f in (exchange, work, in_turn, overlapped)]
    if RANK == 0:
        print(f"{size} MiB: " + ", ".join(f"{t:.2f}" for t in row), flush=True)
