"""What the program has started by mpi4py moves on while a rank waits in an operation of ours."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
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
