"""What the program has started by mpi4py moves on while a rank is in operations of ours."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt


@pytest.mark.parametrize("count", [4, 1 << 18])
def test_a_message_of_mpi4pys_arrives_while_its_sender_waits_in_a_collective(count: int) -> None:
    """MPI 4.0, section 3.7.4: it is too long to be sent before its receiver takes part."""
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    numbers = np.full(1 << 21, float(rank))
    for _ in range(2):
        if rank == 0:
            request = world.Isend(numbers, 1)
        elif rank == 1:
            world.Recv(numbers, 0)
        total = nt.allreduce(jnp.ones(count), m.SUM)
        np.testing.assert_array_equal(total, np.full(count, float(size)))
        if rank == 0:
            request.Wait()
        elif rank == 1:
            assert (numbers == 0).all()


@pytest.mark.skipif(m.COMM_WORLD.size != 3, reason="needs one rank for each part")
@pytest.mark.skipif(MPI.get_vendor()[0] == "Open MPI", reason="it moves nothing on in such calls")
def test_a_message_of_mpi4pys_arrives_while_its_sender_only_sends_short_ones(
    tmp_path: Path,
) -> None:
    """Which go through shared memory, so that none of them needs MPI."""
    world = MPI.COMM_WORLD
    rank = world.Get_rank()
    arrived, end = world.bcast(tmp_path) / "arrived", time.monotonic() + 20

    def is_last() -> np.bool:
        return np.bool(arrived.exists() or time.monotonic() > end)

    @jax.jit
    def send() -> None:
        """Until the long message has arrived."""

        def one(_: int, x: jax.Array) -> jax.Array:
            """Slower than the receiver, so that the mailbox is never full."""
            x = jnp.sin(x)
            nt.send(x[0], 2)
            return x

        def some(_: jax.Array) -> jax.Array:
            jax.lax.fori_loop(0, 100, one, jnp.zeros(60_000))
            last = io_callback(is_last, jax.ShapeDtypeStruct((), bool))
            nt.send(last, 2, tag=1)
            return last

        jax.lax.while_loop(jnp.logical_not, some, jnp.zeros((), bool))

    @jax.jit
    def receive() -> None:
        def some(_: jax.Array) -> jax.Array:
            jax.lax.fori_loop(0, 100, lambda _, x: nt.recv(x, 0), jnp.zeros(()))
            return nt.recv(jnp.zeros((), bool), 0, tag=1)

        jax.lax.while_loop(jnp.logical_not, some, jnp.zeros((), bool))

    # Compiling has MPI move on.
    program = (send if rank == 0 else receive).lower().compile()
    nt.barrier()
    numbers = np.full(1 << 21, float(rank))
    if rank == 0:
        request = world.Isend(numbers, 1)
        program()
        jax.effects_barrier()
        assert arrived.exists()
        request.Wait()
    elif rank == 1:
        world.Recv(numbers, 0)
        arrived.touch()
    else:
        program()
    nt.barrier()
