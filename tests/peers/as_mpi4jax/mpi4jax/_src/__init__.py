"""The parts of mpi4jax inside that its tests import."""
