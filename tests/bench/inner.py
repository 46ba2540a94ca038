"""The inner plugin alone, on one rank: milliseconds of what programs are made of, seconds of a
processor to compile a training step, and how far sums of many float32 are from the exact ones.

JAX_PLATFORMS=mpi_cuda MPI_CUDA_INNER_PLUGIN=xla-cpu-pjrt python inner.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import compile as compiling
import jax
import jax.numpy as jnp
import numpy as np

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


#: Sums of this many numbers of float32.
MANY = 147_456
SUMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum": lambda x: jnp.abs(x).sum(),
    "sum of squares": lambda x: (x * x).sum(),
    "dot product": lambda x: jnp.vdot(x, x),
}


def rounding() -> None:
    """The largest relative error of each sum among ten arrays."""
    arrays = [np.random.default_rng(n).standard_normal(MANY).astype(np.float32) for n in range(10)]
    for name, program in SUMS.items():
        jitted, worst = jax.jit(program), 0.0
        for array in arrays:
            wide = array.astype(np.float64)
            exact = np.abs(wide).sum() if name == "sum" else wide @ wide
            worst = max(worst, abs(float(jitted(array)) / exact - 1))
        print(f"{name} of {MANY} float32: relative error up to {worst:.1e}")


def main() -> None:
    rounding()
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
