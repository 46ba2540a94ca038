"""Host callbacks in programs for several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import (
    MESH,
    RANK,
    SHIFT,
    SIZE,
    D,
    check,
    mapped,
    normal,
    numbers,
    put,
    simulated,
)
from jax import lax
from jax.experimental import io_callback
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def test_debug_callback() -> None:
    """Each rank's host sees its own part."""
    seen: list[Any] = []

    def f(x):
        jax.debug.callback(lambda i, v: seen.append((int(i), v.tolist())), lax.axis_index("x"), x)
        y = lax.psum(x, "x")
        jax.debug.callback(lambda v: seen.append(v.tolist()), y)
        return y

    x = numbers((SIZE, 3))
    check(mapped(f)(put(x)), np.tile(x.sum(0), (SIZE, 1)))
    jax.effects_barrier()
    assert sorted(seen, key=str) == sorted(
        [(RANK, [x[RANK].tolist()]), [x.sum(0).tolist()]], key=str
    )


def test_debug_print(capfd: pytest.CaptureFixture[str]) -> None:
    def f(x):
        jax.debug.print("rank {} has {}", lax.axis_index("x"), x[0])
        return x

    jax.block_until_ready(mapped(f)(put(np.arange(float(SIZE), dtype=np.float32))))
    jax.effects_barrier()
    assert f"rank {RANK} has {float(RANK)}" in capfd.readouterr().out


def test_pure_callback() -> None:
    def f(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        y = jax.pure_callback(lambda v: np.asarray(v) * 2, shape, lax.ppermute(x, "x", SHIFT))
        return lax.psum(y, "x") + y

    x = numbers((SIZE * 2, 3))
    want = simulated(lambda x: lax.psum(x * 2, "x") + lax.ppermute(x * 2, "x", SHIFT), x)
    check(mapped(f, check_vma=False)(put(x)), want)


def test_pure_callback_in_a_loop() -> None:
    def f(x):
        def body(_, y):
            y = jax.pure_callback(
                lambda v: np.asarray(v) + 1, jax.ShapeDtypeStruct(y.shape, y.dtype), y
            )
            return lax.ppermute(y, "x", SHIFT)

        return lax.fori_loop(0, 2 * SIZE, body, x)

    x = numbers((SIZE * 2, 3))
    check(mapped(f, check_vma=False)(put(x)), x + 2 * SIZE)


@pytest.mark.parametrize("ordered", [False, True])
def test_io_callback(ordered: bool) -> None:
    seen: list[float] = []

    def note(v: Any) -> np.ndarray:
        seen.append(float(np.asarray(v).sum()))
        return np.float32(len(seen))

    def f(x):
        total = lax.psum(x, "x")
        first = io_callback(note, jax.ShapeDtypeStruct((), np.float32), x, ordered=ordered)
        return total + lax.pmax(first, "x")

    x = numbers((SIZE, 3))
    got = mapped(f, check_vma=False)(put(x))
    check(got, np.tile(x.sum(0) + 1, (SIZE, 1)))
    jax.effects_barrier()
    assert seen == [float(x[RANK].sum())]


def test_pure_callback_on_replicated_arrays() -> None:
    """Partitioned by XLA: the host function sees the whole array."""

    def f(x):
        y = lax.with_sharding_constraint(x, NamedSharding(MESH, P()))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.asarray(v)[::-1] * 2, shape, y).sum(0) + x.sum(0)

    x = numbers((D, 3))
    check(jax.jit(f)(put(x)), 3 * x.sum(0))


def test_callback_that_computes_with_jax() -> None:
    def host(v: Any) -> np.ndarray:
        return np.asarray(jnp.sin(jnp.asarray(np.asarray(v))))

    def f(x):
        return lax.psum(jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "x")

    x = normal((SIZE, 3))
    check(mapped(f, check_vma=False)(put(x)), np.tile(np.sin(x).sum(0), (SIZE, 1)), 1e-5)


def test_callback_error_names_the_function() -> None:
    def bad(v: Any) -> np.ndarray:
        raise ValueError("not today")

    def f(x):
        return jax.pure_callback(bad, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(Exception, match="not today"):
        jax.block_until_ready(mapped(f, check_vma=False)(put(numbers((SIZE, 3)))))
