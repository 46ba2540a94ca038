"""What the Slurm smoke run starts: the world, an allreduce, and a message round the ring."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import mpi_cuda as m

rank, size = m.COMM_WORLD.rank, m.COMM_WORLD.size
assert size == int(sys.argv[1]), f"{size} ranks instead of {sys.argv[1]}"
assert jax.process_count() == size and jax.process_index() == rank
total, token = m.allreduce(jnp.arange(3.0) + rank, m.SUM)
np.testing.assert_array_equal(total, sum(np.arange(3.0) + r for r in range(size)))
left, right = (rank - 1) % size, (rank + 1) % size
got, token = m.sendrecv(jnp.full(1 << 18, rank), jnp.zeros(1 << 18, int), left, right, token=token)
assert int(got[-1]) == left
print("fine")
