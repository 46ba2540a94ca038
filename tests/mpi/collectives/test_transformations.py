"""`vmap`, nested `shard_map` and `export` of programs with collectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from collectives_support import MESH, ROWS, SHIFT, SIZE, D, check, numbers, put
from jax import export, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def test_nested_shard_map_in_jit_with_other_work() -> None:
    x = numbers((D, D))
    inner = jax.shard_map(
        lambda x: lax.ppermute(x, "x", SHIFT), mesh=MESH, in_specs=P("x"), out_specs=P("x")
    )

    def f(x):
        y = (x @ x.T).sum(0, keepdims=True) + x
        z = inner(y)
        return jnp.sort(z, 0), z.mean(1)

    step = D // SIZE
    want = np.roll((x @ x.T).sum(0, keepdims=True) + x, step, 0)
    check(jax.jit(f)(put(x)), (np.sort(want, 0), want.mean(1)), 1e-6)


def test_vmap_of_shard_map() -> None:
    x = numbers((3, SIZE * 2, 4))
    inner = jax.shard_map(
        lambda x: x + lax.psum(x, "x"), mesh=MESH, in_specs=P("x"), out_specs=P("x")
    )
    got = jax.jit(jax.vmap(inner))(put(x, P(None, "x")))
    blocks = x.reshape(3, SIZE, 2, 4)
    check(got, (blocks + blocks.sum(1, keepdims=True)).reshape(x.shape))


def test_spmd_axis_name() -> None:
    x, w = numbers((D, 4)), numbers((4, 4), seed=1)

    def f(row):
        row = lax.with_sharding_constraint(row @ w, NamedSharding(MESH, P(None)))
        return row / 2

    check(jax.jit(jax.vmap(f, spmd_axis_name="x"))(put(x)), x @ w / 2)


def test_exported() -> None:
    x = numbers((D, 3))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, ROWS))
    exported = export.export(jax.jit(lambda x: x - x.sum(0)))(shape)
    assert exported.nr_devices == SIZE
    check(jax.jit(exported.call)(put(x)), x - x.sum(0))
