"""What a world costs one rank by its size, whose other ranks need not be there: seconds until the
devices are there, threads, memory, and seconds to compile programs for all devices.

JAX_PLATFORMS=mpi_cuda MPI_CUDA_PRETEND_SIZE=1024 python world.py
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def status() -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = dict(line.split(":", 1) for line in lines)
    mebibytes = [int(rows[name].split()[0]) // 1024 for name in ("VmRSS", "VmSize")]
    return f"{int(rows['Threads'])} threads, {mebibytes[0]} MiB, {mebibytes[1]} MiB of addresses"


def step(weights: list[jax.Array], batch: jax.Array) -> list[jax.Array]:
    """Gradient descent of a network of two layers."""

    def loss(weights: list[jax.Array]) -> jax.Array:
        first, second = weights
        return jnp.mean((jax.nn.gelu(batch @ first) @ second - batch) ** 2)

    return [w - 0.1 * g for w, g in zip(weights, jax.grad(loss)(weights), strict=True)]


def main() -> None:
    start = time.perf_counter()
    devices = jax.devices()
    print(f"{len(devices)} devices in {time.perf_counter() - start:.2f} s: {status()}")
    mesh = Mesh(np.array(devices), "x")
    one, all_of = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([], ["x"]))
    batch = jax.ShapeDtypeStruct((4 * len(devices), 64), jnp.float32, sharding=all_of)
    weights = [jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=one)] * 2
    for name, lowered in {
        "sum": jax.jit(lambda x: x.sum(0), out_shardings=one).lower(batch),
        "training step": jax.jit(step, out_shardings=[one, one]).lower(weights, batch),
    }.items():
        start = time.perf_counter()
        lowered.compile()
        print(f"{name} compiled in {time.perf_counter() - start:.2f} s: {status()}")


if __name__ == "__main__":
    main()
