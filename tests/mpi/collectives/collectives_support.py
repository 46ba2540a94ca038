"""Arrays over all ranks, and what programs of them should give: shared by the tests here.

The programs are unmodified ones over the devices of all ranks. The reference is the same
computation on this rank's device alone: `vmap` with an axis name stands for `shard_map`, and arrays
that are not sharded for those that are. The library is not mentioned, and the tests also run on
JAX's CPU backend with several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RANK, SIZE = jax.process_index(), jax.process_count()
DEVICES = np.array(jax.devices())
#: Divisible by 2, 3 and 4.
D = 12
ROWS, COLUMNS, WHOLE = P("x"), P(None, "x"), P()
SHIFT = [(i, (i + 1) % SIZE) for i in range(SIZE)]

MESH = Mesh(DEVICES, ("x",), axis_types=(AxisType.Auto,))
MESH_EXPLICIT = Mesh(DEVICES, ("x",), axis_types=(AxisType.Explicit,))

FOUR = pytest.mark.skipif(SIZE != 4, reason="needs a mesh of 2 by 2")
SEVERAL = pytest.mark.skipif(SIZE < 2, reason="needs several ranks")


def mesh_2d(devices: Any = None) -> Mesh:
    devices = DEVICES if devices is None else devices
    return Mesh(np.reshape(devices, (2, 2)), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def numbers(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Small whole numbers, so that sums are exact in any order."""
    values = np.random.default_rng(seed).integers(-4, 5, tuple(shape))
    if np.dtype(dtype).kind in "ub":
        values = abs(values)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * np.random.default_rng(seed + 1).integers(-4, 5, tuple(shape))
    return values.astype(dtype)


def normal(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)


def put(value: Any, spec: P = ROWS, mesh: Mesh = MESH) -> jax.Array:
    """An array over all ranks; each gives its own part."""
    value = np.asarray(value)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value if value.dtype.kind in "biufc" else value.astype(np.float32)


def check(got: Any, want: Any, tolerance: float = 0.0) -> None:
    """This rank's parts are those of the expected whole; the other ranks check theirs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, array), whole in leaves:
        name, expected = jax.tree_util.keystr(path), np.asarray(whole)
        assert array.shape == expected.shape, name
        assert array.dtype == expected.dtype, name
        assert array.addressable_shards, name
        for shard in array.addressable_shards:
            here, there = wide(shard.data), wide(expected[shard.index])
            if tolerance:
                np.testing.assert_allclose(here, there, tolerance, tolerance, err_msg=name)
            else:
                np.testing.assert_array_equal(here, there, err_msg=name)


def together(functions: dict[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    """All of them in one program, which is faster than a program for each."""
    return lambda *args: {name: f(*args) for name, f in functions.items()}


def local(f: Callable[..., Any], *args: Any) -> Any:
    """`f` of whole arrays, on this rank's device alone; compiled in a hurry."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    results = jax.jit(f, compiler_options=options)(*jax.device_put(args, jax.local_devices()[0]))
    return jax.tree.map(np.asarray, results)


def at_least_1d(tree: Any) -> Any:
    return jax.tree.map(lambda y: y[None] if jnp.ndim(y) == 0 else y, tree)


def simulated(f: Callable[..., Any], *args: np.ndarray, count: int = SIZE) -> Any:
    """`shard_map` of `f` along the first axis, by `vmap` on this rank's device."""
    blocks = [x.reshape(count, x.shape[0] // count, *x.shape[1:]) for x in args]
    results = local(jax.vmap(lambda *b: at_least_1d(f(*b)), axis_name="x"), *blocks)
    return jax.tree.map(lambda y: y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]), results)


def mapped(f: Callable[..., Any], mesh: Mesh = MESH, check_vma: bool = True) -> Any:
    def body(*blocks: Any) -> Any:
        return at_least_1d(f(*blocks))

    specs = {"in_specs": P("x"), "out_specs": P("x")}
    return jax.jit(jax.shard_map(body, mesh=mesh, check_vma=check_vma, **specs))


def same(f: Callable[..., Any], *args: np.ndarray, tolerance: float = 0.0, **options: Any) -> None:
    """`shard_map` of `f` gives what the simulation gives."""
    check(mapped(f, **options)(*map(put, args)), simulated(f, *args), tolerance)


def varying(x: jax.Array) -> jax.Array:
    """Something that is the same everywhere as something that need not be."""
    return lax.pcast(x, "x", to="varying")


def init_mlp(width: int = D) -> dict[str, np.ndarray]:
    return {"a": normal((width, 2 * width), 1) / 4, "b": normal((2 * width, width), 2) / 4}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_loss(params, x, y):
    return ((mlp(params, x) - y) ** 2).mean()


def mlp_step(params, x, y):
    loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), loss


def trained(x: np.ndarray, y: np.ndarray, steps: int) -> tuple[Any, Any]:
    params, loss = init_mlp(), None
    for _ in range(steps):
        params, loss = local(mlp_step, params, x, y)
    return params, loss
