"""What a new communicator costs: milliseconds and KiB for each of N, made by mpi4py's Dup, used in
one program, and freed. The shortest and the median time; the growth of the process from a tenth of
N on.

Usage: mpirun -n 2 python communicators.py N

kept: one communicator all the time. program: a new one for each, in a program that is made for it.
static: the same, as the static argument of one jitted function. eager: outside of programs.
cleared: with `jax.clear_caches()` after each 25.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as mpi

X = jnp.ones(8)


def resident() -> float:
    """KiB of memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4.0


def step(x: jax.Array, comm: Any) -> jax.Array:
    return mpi.allreduce(x * 2, m.SUM, comm=comm) + 1


static = jax.jit(step, static_argnums=1)


def in_a_program(comm: Any) -> None:
    jax.jit(lambda x: step(x, comm))(X).block_until_ready()


def as_an_argument(comm: Any) -> None:
    static(X, m.as_comm(comm)).block_until_ready()


def outside(comm: Any) -> None:
    mpi.allreduce(X, m.SUM, comm=comm).block_until_ready()


def with_new(use: Callable[[Any], None]) -> None:
    comm = MPI.COMM_WORLD.Dup()
    use(comm)
    comm.Free()


def main() -> None:
    n = int(sys.argv[1])
    kept = MPI.COMM_WORLD.Dup()
    ways: dict[str, tuple[Callable[[], None], int]] = {
        "kept": (lambda: as_an_argument(kept), 0),
        "program": (lambda: with_new(in_a_program), 0),
        "static": (lambda: with_new(as_an_argument), 0),
        "static, cleared": (lambda: with_new(as_an_argument), 25),
        "eager": (lambda: with_new(outside), 0),
        "eager, cleared": (lambda: with_new(outside), 25),
    }
    for name, (way, clear) in ways.items():
        times, before = [], 0.0
        for place in range(n):
            if place == n // 10:
                before = resident()
            start = time.perf_counter()
            way()
            if clear and place % clear == clear - 1:
                jax.clear_caches()
            times.append((time.perf_counter() - start) * 1e3)
        each = (resident() - before) / (n - n // 10)
        if m.COMM_WORLD.rank == 0:
            shortest, median = min(times), statistics.median(times)
            print(f"{name}: {shortest:.2f} ms, median {median:.2f}, {each:.0f} KiB", flush=True)
    kept.Free()


main()
