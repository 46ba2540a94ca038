"""A Cholesky decomposition of a batch that is sharded over all ranks, partitioned by JAX's own XLA,
which knows that matrices are independent, and by the inner plugin's, which does not.

JAX_PLATFORMS=mpi_cuda mpirun -n 2 python batch.py [MATRICES OF EACH RANK] [ROWS]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mpi_cuda as m
from mpi_cuda import _library


def main() -> None:
    each, rows = [*map(int, sys.argv[1:]), 64, 64][:2]
    shards = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    count = each * m.COMM_WORLD.size
    numbers = np.random.default_rng(0).random((count, rows, rows), np.float32)
    matrices = numbers @ numbers.transpose(0, 2, 1) + rows * np.eye(rows, dtype=np.float32)
    batch = jax.make_array_from_callback(matrices.shape, shards, matrices.__getitem__)
    lines = []
    for name in ("JAX's XLA", "the inner plugin's XLA"):
        start = time.perf_counter()
        run = jax.jit(jnp.linalg.cholesky, out_shardings=shards).lower(batch).compile()
        compiled = time.perf_counter() - start
        best = float("inf")
        for _ in range(30):
            start = time.perf_counter()
            run(batch).block_until_ready()
            best = min(best, time.perf_counter() - start)
        lines.append(f"{name}: {best * 1e3:.2f} ms, compiled in {compiled:.2f} s")
        _library.load().mpi_cuda_set_partitioner(None)
        jax.clear_caches()
    if m.COMM_WORLD.rank == 0:
        print(f"{count} matrices of {rows} x {rows}", *lines, sep="\n")


if __name__ == "__main__":
    main()
