"""What comes from other packages: their FFI targets, host callbacks, and mpi4jax."""
