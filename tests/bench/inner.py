"""The inner plugin alone, on one rank: milliseconds of what programs are made of, and seconds of a
processor to compile a training step.

JAX_PLATFORMS=mpi_cuda MPI_CUDA_INNER_PLUGIN=xla-cpu-pjrt python inner.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import compile as compiling
import jax
import jax.numpy as jnp

A = jax.random.normal(jax.random.key(0), (1024, 1024))
PROGRAMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "product": lambda a: a @ a,
    "product in bfloat16": lambda a: a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16),
    "element by element": lambda a: jnp.tanh(a) * jnp.exp(-a * a) + jnp.sin(a),
    "sum": lambda a: a.sum(0),
    "sort": lambda a: jnp.sort(a, axis=-1),
    "fft": lambda a: jnp.abs(jnp.fft.fft2(a)),
    "cholesky": lambda a: jnp.linalg.cholesky(a @ a.T + 1024 * jnp.eye(1024)),
    "50 steps of a stencil": lambda a: jax.lax.fori_loop(0, 50, lambda _, x: stencil(x), a),
}


def stencil(x: jax.Array) -> jax.Array:
    return sum(jnp.roll(x, shift, axis) for shift in (1, -1) for axis in (0, 1)) / 4


def main() -> None:
    for layers in (2, 8):
        runs = [compiling.seconds(jax.devices(), layers)[1] for _ in range(3)]
        print(f"compile {layers} layers: {min(runs):.2f} s")
    for name, program in PROGRAMS.items():
        jitted, times = jax.jit(program), []
        jitted(A).block_until_ready()
        for _ in range(10):
            start = time.perf_counter()
            jitted(A).block_until_ready()
            times.append(time.perf_counter() - start)
        print(f"{name}: {min(times) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
