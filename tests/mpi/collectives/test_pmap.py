"""`pmap` over the devices of all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from collectives_support import RANK, SHIFT, SIZE, D, init_mlp, mlp_loss, normal, numbers, trained
from jax import lax


def own(array: jax.Array) -> np.ndarray:
    """This rank's part of a result of `pmap`."""
    (shard,) = array.addressable_shards
    return np.asarray(shard.data)


def test_pmap_collectives() -> None:
    x = numbers((SIZE, 3, 4))

    @partial(jax.pmap, axis_name="i")
    def f(x):
        others = lax.all_gather(x, "i")
        moved = lax.ppermute(x, "i", SHIFT)
        return lax.psum(x, "i"), lax.pmax(x, "i"), moved, others, lax.axis_index("i")

    total, top, moved, others, index = map(own, f(x[RANK : RANK + 1]))
    np.testing.assert_array_equal(total.reshape(3, 4), x.sum(0))
    np.testing.assert_array_equal(top.reshape(3, 4), x.max(0))
    np.testing.assert_array_equal(moved.reshape(3, 4), x[RANK - 1])
    np.testing.assert_array_equal(others.reshape(x.shape), x)
    assert index.ravel().tolist() == [RANK]


def test_pmap_training_with_donation() -> None:
    x, y = normal((D, D), 3), normal((D, D), 4)
    step = D // SIZE
    mine = slice(RANK * step, (RANK + 1) * step)

    @partial(jax.pmap, axis_name="i", donate_argnums=0)
    def train(params, x, y):
        loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        grads = lax.pmean(grads, "i")
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), lax.pmean(loss, "i")

    params: Any = jax.tree.map(lambda p: p[None], init_mlp())
    loss = None
    for _ in range(3):
        params, loss = train(params, x[None, mine], y[None, mine])
    want, want_loss = trained(x, y, 3)
    for name, value in want.items():
        got = own(params[name]).reshape(value.shape)
        np.testing.assert_allclose(got, value, 1e-4, 1e-5)
    np.testing.assert_allclose(own(loss).ravel(), want_loss, 1e-4)


def test_pmap_without_collectives() -> None:
    got = jax.pmap(lambda x, y: x * y, in_axes=(0, None))(
        np.full((1, 3), RANK + 1.0), np.arange(3.0)
    )
    np.testing.assert_array_equal(own(got).ravel(), (RANK + 1) * np.arange(3))
