"""A rank that waits for what another one compiles, which ends meanwhile."""

from __future__ import annotations

from jobs import job

#: Rank 0 asks first, and its compilation takes longer than it lives.
ENDS = """
import os, threading, time
import jax, jax.numpy as jnp
import mpi_cuda as m

def slow(x):
    for i in range(200):
        x = jnp.sin(x @ x + i)
    return x

lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
m.barrier()
if m.COMM_WORLD.rank == 0:
    threading.Timer(0.1, os._exit, [0]).start()
else:
    time.sleep(0.05)
lowered.compile()
print("compiled by", m.COMM_WORLD.rank, flush=True)
os._exit(0)
"""


def test_a_rank_compiles_what_one_that_ended_began() -> None:
    """Without a word, as one that was killed. Open MPI's launcher can leave the others alone."""
    options = ("--enable-recovery", "--mca", "orte_abort_on_non_zero_status", "0")
    result = job("openmpi", ENDS, options=options, MPI_CUDA_LOG="debug")
    assert result.stdout == "compiled by 1\n", result.stderr
    taken = [line for line in result.stderr.splitlines() if "has compiled" in line]
    assert len(taken) <= 1, "the barrier alone can be taken"
