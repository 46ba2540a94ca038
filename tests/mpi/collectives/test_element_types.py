"""Types of elements: what is moved and what is reduced, and arrays that are donated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from collectives_support import (
    MESH,
    RANK,
    ROWS,
    SHIFT,
    SIZE,
    D,
    check,
    local,
    numbers,
    put,
    same,
)
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

KINDS: dict[str, list[str]] = {
    "bool": ["bool"],
    "signed": ["int8", "int16", "int32", "int64"],
    "unsigned": ["uint8", "uint16", "uint32", "uint64"],
    "real": ["float32", "float64"],
    "half": ["float16", "bfloat16"],
    "complex": ["complex64", "complex128"],
}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def moved(*arrays: jax.Array) -> Any:
    return [
        (
            lax.ppermute(x, "x", SHIFT),
            lax.all_gather(x, "x", axis=1),
            lax.all_to_all(x, "x", 1, 0, tiled=True),
        )
        for x in arrays
    ]


def counted(dtype: str) -> np.ndarray:
    return (np.arange(SIZE * 3 * D).reshape(SIZE * 3, D) % 5).astype(dtype_of(dtype))


def exchange(x: jax.Array) -> jax.Array:
    """Its pieces lie one after the other, so nothing but the exchange copies them."""
    return lax.all_to_all(x, "x", 0, 0, tiled=True)


#: Steps of loops in which arrays take each other's memory while they are exchanged.
STEPS: dict[str, Callable[..., Any]] = {
    "itself": lambda i, x, y: (exchange(x), y),
    "both": lambda i, x, y: (exchange(x), exchange(y)),
    "crosswise": lambda i, x, y: (exchange(y), exchange(x)),
    "kept": lambda i, x, y: (x + exchange(y), x),
    "overwritten": lambda i, x, y: (x * 2 + i, exchange(x)),
    "updated": lambda i, x, y: (x.at[0].set(i), exchange(x)),
    "updated after": lambda i, x, y: (exchange(x).at[0].add(y[1]), exchange(x.at[1].set(0))),
    "read": lambda i, x, y: (exchange(x @ x.T @ y), y + x),
    "branches": lambda i, x, y: (
        *lax.cond(i % 2 == 0, lambda x, y: (exchange(x), x), lambda x, y: (y, exchange(y)), x, y),
    ),
}


@pytest.mark.parametrize("donate", [(), (0, 1)])
@pytest.mark.parametrize("step", STEPS)
def test_whole_arrays_are_exchanged(step: str, donate: tuple[int, ...]) -> None:
    def loop(x: jax.Array, y: jax.Array) -> Any:
        x, y = STEPS[step](0, x, y)
        x, y = lax.fori_loop(1, 4, lambda i, c: STEPS[step](i, *c), (x, y))
        return exchange(x) % 7, y % 7, exchange(y) % 7

    arrays = [numbers((SIZE * D, D), seed=seed) for seed in (1, 2)]
    sharded = [jax.device_put(x, NamedSharding(MESH, ROWS)) for x in arrays]
    mapped = jax.shard_map(loop, mesh=MESH, in_specs=ROWS, out_specs=ROWS)
    results = jax.jit(mapped, donate_argnums=donate)(*sharded)
    parts = [x.reshape(SIZE, D, D) for x in arrays]
    for result, want in zip(results, jax.vmap(loop, axis_name="x")(*parts), strict=True):
        np.testing.assert_array_equal(result.addressable_shards[0].data, want[RANK])


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_moved(kind: str) -> None:
    with jax.enable_x64(True):
        same(moved, *map(counted, KINDS[kind]))


def test_8_bit_floats_are_moved() -> None:
    same(moved, *map(counted, ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]))


@pytest.mark.not_on_gpu("XLA:GPU leaves them, and they are refused")
def test_8_bit_floats_are_reduced() -> None:
    x = counted("float8_e4m3fn") % 3, counted("float8_e5m2") % 3
    same(lambda *x: (lax.psum(x, "x"), lax.pmax(x, "x")), *x)


@pytest.mark.parametrize("place", range(3))
def test_4_bit_floats_are_moved(place: int) -> None:
    same(lambda x: moved(x)[0][place], counted("float4_e2m1fn"))


def test_8_bit_floats_are_partitioned_and_donated() -> None:
    sharding = NamedSharding(MESH, ROWS)
    values = counted("float8_e4m3fn")
    x = jax.device_put(values, sharding)
    step = jax.jit(lambda x: lax.with_sharding_constraint(x + x[::-1], sharding), donate_argnums=0)
    y = step(x)
    assert x.is_deleted()
    assert y.sharding == sharding and y.dtype == values.dtype
    want = (values.astype(np.float32) + values[::-1].astype(np.float32)).astype(values.dtype)
    np.testing.assert_array_equal(multihost_utils.process_allgather(y, tiled=True), want)


@pytest.mark.parametrize("place", range(3))
def test_4_bit_integers_are_moved(place: int) -> None:
    """One at a time: XLA's CPU compiler does not survive all three in one program."""
    same(lambda x: moved(x)[0][place], counted("int4"))


def reduced(*arrays: jax.Array) -> Any:
    results = []
    for x in arrays:
        results += [lax.psum(x, "x"), lax.psum_scatter(x, "x", tiled=True)]
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            results += [lax.pmax(x, "x"), lax.pmin(x, "x")]
    return results


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bool"])
def test_dtypes_are_reduced(kind: str) -> None:
    arrays = [numbers((SIZE * D, 3), dtype_of(dtype)) for dtype in KINDS[kind]]
    with jax.enable_x64(True):
        same(reduced, *arrays, tolerance=0 if "signed" in kind else 1e-2)


def test_extremes() -> None:
    """The largest and smallest of each type, and infinities."""
    arrays = []
    for dtype in ("int8", "uint8", "int32", "uint32", "float32"):
        info = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
        arrays.append(np.array([[info.min, info.max, 1], [info.max, info.min, 0]] * SIZE, dtype))
    arrays[-1][0, 0], arrays[-1][-1, 1] = np.inf, -np.inf
    same(lambda *x: (lax.pmax(x, "x"), lax.pmin(x, "x")), *arrays)


def test_nan_is_passed_on() -> None:
    x = numbers((SIZE, 4))
    x[-1, 1] = x[0, 2] = np.nan
    same(lambda x: (lax.pmax(x, "x"), lax.pmin(x, "x"), lax.psum(x, "x")), x)


def test_bool_is_reduced() -> None:
    x = np.array([[True, True, False, False]] * SIZE)
    x[-1] = [True, False, True, False]
    reduce = jax.jit(lambda x: (x.all(0), x.any(0), jnp.count_nonzero(x, 0), x.sum(), x.max(0)))
    check(reduce(put(x)), local(reduce, x))
