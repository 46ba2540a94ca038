"""Seconds until all ranks have compiled a program, without tracing: a training step for the devices
of all ranks, the same for one device, and a small program for one device.

MPI_CUDA_SHARE_COMPILED=0 mpirun -n 4 python share_compiled.py [LAYERS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda

WIDTH = 128
TIMES = 3


def step(layers: int, devices: list[jax.Device], rate: float) -> jax.stages.Lowered:
    """A data-parallel step of training; of another rate it is another program."""

    def loss(params, x):
        for first, second in params:
            x = x + jax.nn.gelu(x @ first) @ second
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jnp.mean(x**2)

    def train(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    mesh = Mesh(np.array(devices), ("data",))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    layer = tuple(jax.ShapeDtypeStruct(shape, np.float32, sharding=whole) for shape in shapes)
    x = jax.ShapeDtypeStruct((64, WIDTH), np.float32, sharding=rows)
    return jax.jit(train, donate_argnums=0).lower([layer] * layers, x)


def small(rate: float) -> jax.stages.Lowered:
    """A program of two instructions."""
    return jax.jit(lambda x: rate * x + 1).lower(jax.ShapeDtypeStruct((8,), np.float32))


def seconds(lowered: jax.stages.Lowered) -> float:
    """Until all ranks have compiled it."""
    mpi_cuda.barrier()
    start = time.perf_counter()
    lowered.compile()
    mpi_cuda.barrier()
    return time.perf_counter() - start


def main() -> None:
    """Prints medians."""
    layers = int(sys.argv[1]) if sys.argv[1:] else 8
    programs: dict[str, Callable[[float], jax.stages.Lowered]] = {
        "all devices": lambda rate: step(layers, jax.devices(), rate),
        "one device": lambda rate: step(layers, jax.local_devices(), rate),
        "small": small,
    }
    texts = []
    mpi_cuda.barrier()
    for name, lower in programs.items():
        times = 10 * TIMES if name == "small" else TIMES
        median = np.median([seconds(lower(0.1 + number)) for number in range(times)])
        texts.append(f"{name} {median:.3f}")
    if jax.process_index() == 0:
        print(", ".join(texts), flush=True)


if __name__ == "__main__":
    main()
