"""Gradients through collectives, against those of the same function of all blocks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import SHIFT, SIZE, check, local, mapped, normal, put, together
from jax import lax


def gradient_of_psum(x):
    return jax.grad(lambda x: lax.psum((x**2 * jnp.arange(4.0)).sum(), "x"))(x)


def gradient_of_pmean_of_product(x):
    return jax.value_and_grad(lambda x: lax.pmean((x * lax.pmean(x, "x")).sum(), "x"))(x)


def gradient_of_ppermute(x):
    return jax.grad(lambda y: lax.psum((lax.ppermute(y, "x", SHIFT) * x).sum(), "x"))(x)


def gradient_of_all_gather(x):
    weights = jnp.arange(float(SIZE))[:, None, None]
    return jax.grad(lambda y: lax.psum((lax.all_gather(y, "x") * weights * x).sum(), "x"))(x)


def gradient_of_psum_scatter(x):
    def loss(y):
        return lax.psum((lax.psum_scatter(jnp.tile(y, (SIZE, 1)), "x", tiled=True) ** 2).sum(), "x")

    return jax.grad(loss)(x)


def gradient_of_all_to_all(x):
    def loss(y):
        y = lax.all_to_all(jnp.tile(y, (SIZE, 1)), "x", 0, 1, tiled=True)
        return lax.psum((y**2 * jnp.arange(y.shape[1])).sum(), "x")

    return jax.grad(loss)(x)


def gradient_with_scan(x):
    def loss(x):
        def body(c, row):
            return jnp.sin(lax.ppermute(c, "x", SHIFT)) + row, lax.psum(c, "x")

        c, totals = lax.scan(body, x[0], x)
        return lax.psum(c.sum(), "x") + totals.sum()

    return jax.grad(loss)(x)


def gradient_with_remat(x):
    @jax.checkpoint
    def layer(x):
        return jnp.sin(lax.psum(x, "x")) * x

    return jax.grad(lambda x: lax.psum(layer(layer(x)).sum(), "x"))(x)


def gradient_with_custom_vjp(x):
    @jax.custom_vjp
    def f(x):
        return lax.ppermute(x, "x", SHIFT)

    def forward(x):
        return f(x), x

    def backward(x, g):
        return (lax.ppermute(g, "x", [(b, a) for a, b in SHIFT]) * 3 + lax.pmax(x, "x"),)

    f.defvjp(forward, backward)
    return jax.grad(lambda x: lax.psum((f(x) ** 2).sum(), "x"))(x)


def gradient_with_jvp(x):
    return jax.jvp(lambda x: lax.pmean(jnp.sin(x), "x") * x, (x,), (x * 0.5,))


def gradient_with_cond(x):
    def loss(x):
        y = lax.cond(
            lax.psum(1, "x") > 1, lambda x: lax.ppermute(x, "x", SHIFT) ** 2, lambda x: x, x
        )
        return lax.psum(y.sum(), "x")

    return jax.grad(loss)(x)


GRADIENTS: dict[str, Callable[..., Any]] = {
    name.removeprefix("gradient_"): f
    for name, f in globals().items()
    if name.startswith("gradient_")
}


@pytest.mark.parametrize("kind", ["of", "with"])
def test_gradient_in_shard_map(kind: str) -> None:
    """The reference differentiates the same function of all blocks at once."""
    x = normal((SIZE * 3, 4))
    functions = {name: f for name, f in GRADIENTS.items() if name.split("_")[0] == kind}
    got = mapped(together(functions))(put(x))
    check(got, {name: REFERENCES[name](x) for name in functions}, 1e-4)


def of_total(loss: Callable[[jax.Array], jax.Array]) -> Callable[[np.ndarray], Any]:
    """The gradient of a function of all blocks at once."""

    def gradient(x: np.ndarray) -> Any:
        g = local(jax.grad(lambda b: loss(b)), x.reshape(SIZE, -1, x.shape[1]))
        return g.reshape(x.shape)

    return gradient


def shifted(b: jax.Array) -> jax.Array:
    return jnp.roll(b, 1, 0)


def reference_scan(b):
    def body(c, rows):
        return jnp.sin(shifted(c)) + rows, c.sum(0)

    c, totals = lax.scan(body, b[:, 0], b.swapaxes(0, 1))
    return c.sum() + totals.sum()


def reference_remat(b):
    def layer(b):
        return jnp.sin(b.sum(0)) * b

    return layer(layer(b)).sum()


def reference_all_gather(x: np.ndarray) -> np.ndarray:
    """Block j is weighted by j and the sum of all blocks."""
    b = x.reshape(SIZE, -1, x.shape[1])
    return (np.arange(SIZE)[:, None, None] * b.sum(0)).astype(np.float32).reshape(x.shape)


def reference_all_to_all(b):
    """Every rank gets every block, side by side."""
    wide = jnp.concatenate(list(b), 1)
    return SIZE * (wide**2 * jnp.arange(wide.shape[1])).sum()


def reference_pmean_of_product(x: np.ndarray) -> Any:
    b = x.reshape(SIZE, -1, x.shape[1])
    value, g = local(jax.value_and_grad(lambda b: (b.mean(0) ** 2).sum()), b)
    return np.full(SIZE, value), g.reshape(x.shape)


def reference_custom_vjp(x: np.ndarray) -> np.ndarray:
    b = x.reshape(SIZE, -1, x.shape[1])
    return (6 * b + b.max(0)).reshape(x.shape)


def reference_jvp(x: np.ndarray) -> Any:
    def f(b):
        return jnp.sin(b).mean(0) * b

    b = x.reshape(SIZE, -1, x.shape[1])
    results = local(lambda b: jax.jvp(f, (b,), (b * 0.5,)), b)
    return jax.tree.map(lambda y: y.reshape(x.shape), results)


def reference_ppermute(x: np.ndarray) -> np.ndarray:
    return np.roll(x.reshape(SIZE, -1, x.shape[1]), -1, 0).reshape(x.shape)


REFERENCES: dict[str, Callable[[np.ndarray], Any]] = {
    "of_psum": of_total(lambda b: (b**2 * jnp.arange(4.0)).sum()),
    "of_pmean_of_product": reference_pmean_of_product,
    "of_ppermute": reference_ppermute,
    "of_all_gather": reference_all_gather,
    "of_psum_scatter": of_total(lambda b: SIZE * (b.sum(0) ** 2).sum()),
    "of_all_to_all": of_total(reference_all_to_all),
    "with_scan": of_total(reference_scan),
    "with_remat": of_total(reference_remat),
    "with_custom_vjp": reference_custom_vjp,
    "with_jvp": reference_jvp,
    "with_cond": of_total(lambda b: (shifted(b) ** 2).sum() if SIZE > 1 else b.sum()),
}
