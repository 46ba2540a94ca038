"""What the collectives that can be started are called with, for tests of starts and `wait`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import mpi_cuda as m

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
ROOT = SIZE - 1
X = jnp.arange(6.0).reshape(2, 3) + RANK
# A block for each rank.
EACH = jnp.arange(2.0 * SIZE).reshape(SIZE, 2) * (RANK + 1)

# By the name of the blocking one: its operand, and what comes behind it.
CALLS: dict[str, tuple[Any, ...]] = {
    "allgather": (X,),
    "allreduce": (X, m.SUM),
    "alltoall": (EACH,),
    "bcast": (X, ROOT),
    "exscan": (X, m.SUM),
    "gather": (X, ROOT),
    "reduce": (X, m.SUM, ROOT),
    "reduce_scatter": (EACH, m.SUM),
    "scan": (X, m.SUM),
    "scatter": (EACH if RANK == ROOT else EACH[0], ROOT),
}
