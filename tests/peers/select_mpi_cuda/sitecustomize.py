"""Selects mpi_cuda in children that tests start with hardly any environment."""

import os

os.environ.setdefault("JAX_PLATFORMS", "mpi_cuda")
