"""Programs for one device, whose results are to be the same when their optimized modules are
compiled again as they are: what becomes of a program for several devices, without its rewriting.

Usage: python tests/gpu/recompile.py RESULTS.npz, with and without MPI_CUDA_RECOMPILE=1; the second
run compares with what the first has written.
"""

from __future__ import annotations

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

X = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


def definite(x: jax.Array) -> jax.Array:
    """Symmetric, and with a clear diagonal."""
    return x @ x.T + 64 * jnp.eye(64)


PROGRAMS = {
    "elementwise": lambda x: jnp.tanh(x) * jnp.exp(-(x**2)) + jnp.sin(x),
    "matmul": lambda x: x @ x,
    "batched matmul": lambda x: jnp.einsum(
        "bij,bjk->bik", x.reshape(4, 16, 64), x.reshape(4, 64, 16)
    ),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "layer norm": lambda x: (
        (x - x.mean(1, keepdims=True)) * lax.rsqrt(jnp.var(x, 1)[:, None] + 1e-5)
    ),
    "reductions": lambda x: (x.sum(0), jnp.max(x, 1), jnp.argmin(x, 0)),
    "cumulative sum": lambda x: jnp.cumsum(x, 1),
    "convolution": lambda x: lax.conv_general_dilated(
        x.reshape(1, 64, 64, 1),
        x[:3, :3].reshape(3, 3, 1, 1),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "pooling": lambda x: lax.reduce_window(x, 0.0, lax.add, (4, 4), (2, 2), "VALID"),
    "fft": lambda x: jnp.abs(jnp.fft.fft2(x)),
    "sort": lambda x: (jnp.sort(x, 1), jnp.argsort(x, 0)),
    "gather": lambda x: x[np.arange(64)[::-1], np.arange(64) % 7],
    "scatter": lambda x: jnp.zeros((64,)).at[np.arange(64) % 5].add(x[0]),
    "transposes": lambda x: jnp.transpose(x.reshape(4, 16, 8, 8), (2, 0, 3, 1)).reshape(64, 64),
    "bfloat16": lambda x: (x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(jnp.float32),
    "integers": lambda x: ((x * 100).astype(jnp.int32) % 7) << 2,
    "random numbers": lambda x: jax.random.normal(jax.random.key(3), (1000,)),
    "cholesky": lambda x: jnp.linalg.cholesky(definite(x)),
    "solve": lambda x: jnp.linalg.solve(definite(x), x),
    "eigenvalues": lambda x: jnp.linalg.eigvalsh(definite(x)),
    "scan": lambda x: lax.scan(lambda c, row: (0.5 * c + row, c.sum()), jnp.zeros(64), x),
    "while": lambda x: lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 1, s[1] * 0.9), (0, x)),
    "branches": lambda x: lax.cond(jnp.sum(x) > 0, jnp.cos, jnp.sin, x),
    "gradient": lambda x: jax.grad(lambda w: jnp.tanh(x @ w).sum())(x),
}
#: What needs libraries that a simulated GPU (`tests/gpu/simulator`) has not.
LIBRARIES = {"convolution", "fft", "cholesky", "solve", "eigenvalues", "batched matmul"}


def main() -> int:
    """Runs the programs; 1 if one differs from the run before."""
    file = sys.argv[1]
    if "SIMULATED_GPU" in os.environ:
        for name in LIBRARIES:
            del PROGRAMS[name]
    found = {
        f"{name} {i}": np.asarray(leaf)
        for name, program in PROGRAMS.items()
        for i, leaf in enumerate(jax.tree.leaves(jax.jit(program)(jnp.asarray(X))))
    }
    # Arguments are parameters of the module, and may be given away.
    step = jax.jit(lambda x, y: (x * 2 + y, x @ y), donate_argnums=0)
    found |= {f"donated {i}": np.asarray(x) for i, x in enumerate(step(jnp.asarray(X), X.T))}
    how = jax.local_devices()[0].device_kind
    if not os.path.exists(file):
        np.savez(file, **found)
        print(f"{len(PROGRAMS) + 1} programs on {how}")
        return 0
    before = np.load(file)
    different = [k for k, x in found.items() if not np.allclose(before[k], x, 1e-5, 1e-5)]
    exact = sum(np.array_equal(before[k], x) for k, x in found.items())
    print(f"{len(PROGRAMS) + 1} programs on {how}, {len(found)} results: {exact} are equal")
    print(f"{len(different)} differ: {different}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
