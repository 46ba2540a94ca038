"""How much of a core a rank takes while it waits, and how fast it is when what it waits for comes.

Usage: mpirun -n 2 python tests/bench/waiting.py [SECONDS]. Rank 0 comes to each operation SECONDS
(5) late. Prints, for each, the share of one core that rank 1 took meanwhile, all of its threads
together, and the microseconds from the moment that rank 0 dispatched it to its end on rank 1 (by
the clock of this node, so on one node only).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
X = jnp.arange(3.0)
MESH = jax.make_mesh((SIZE,), ("x",))
SHARDED = jax.NamedSharding(MESH, jax.P("x"))
SHARDS = jax.make_array_from_callback((SIZE,), SHARDED, lambda index: np.arange(float(SIZE))[index])
TOTAL = jax.jit(lambda x: x.sum())


def receive() -> Any:
    return nt.recv(X, 0) if RANK else nt.send(X, 1)


def irecv() -> Any:
    if RANK == 0:
        return nt.send(X, 1)
    request = nt.irecv(X, 0)
    return nt.wait(request)


CASES: dict[str, Callable[[], Any]] = {
    "allreduce": lambda: nt.allreduce(X, m.SUM),
    "barrier": lambda: m.barrier(),
    "recv": receive,
    "irecv and wait": irecv,
    "a program for all devices": lambda: TOTAL(SHARDS),
}


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    for name, case in CASES.items():
        for _ in range(3):
            jax.block_until_ready(case())
        MPI.COMM_WORLD.Barrier()
        if RANK == 0:
            time.sleep(SECONDS)
        begun, used = time.time(), processor_seconds()
        jax.block_until_ready(case())
        ended, share = time.time(), (processor_seconds() - used) / SECONDS
        starts = MPI.COMM_WORLD.bcast(begun)
        if RANK == 1:
            late = (ended - starts) * 1e6
            print(
                f"{name:28} {100 * share:6.2f} % of a core, {late:8.0f} us to its end", flush=True
            )


main()
