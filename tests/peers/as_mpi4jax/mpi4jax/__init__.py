"""Our package under mpi4jax's name, for mpi4jax 0.7's own tests (`tests/peers/mpi4jax`)."""

from mpi_cuda import *  # noqa: F403
from mpi_cuda import has_cuda_support, notoken  # noqa: F401
