"""A plugin of pytest: jaxDecomp's tests on ranks, in place of the eight devices of one process."""

from __future__ import annotations

import os

import conftest  # type: ignore[import-not-found]  # jaxDecomp's

conftest.setup_done = conftest.on_cluster = True
if os.environ["JAXDECOMP_BACKEND"] == "gloo":
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    rank, size = (int(os.environ[name]) for name in ("PMI_RANK", "PMI_SIZE"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("127.0.0.1:29761", size, rank)
else:
    os.environ["JAX_PLATFORMS"] = "mpi_cuda"
