"""Collectives in loops, branches, scans and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from collectives_support import SHIFT, SIZE, numbers, same, together
from jax import lax


def flow_fori_plain(x):
    return lax.fori_loop(0, 5, lambda i, y: lax.ppermute(y, "x", SHIFT) + i * x, x)


def flow_fori_with_traced_bound(x):
    bound = lax.psum(1, "x") + lax.pmax(x[0, 0], "x").astype(jnp.int32) % 3
    return lax.fori_loop(0, bound, lambda i, y: lax.psum(y, "x") * 0.25 + x + i, x)


def flow_while_condition(x):
    """The number of steps is decided by all."""
    return lax.while_loop(
        lambda y: lax.pmax(abs(y).max(), "x") < 1e3,
        lambda y: y * 2 + lax.ppermute(y, "x", SHIFT),
        x + 9,
    )


def flow_while_only_condition(x):
    return lax.while_loop(lambda y: lax.psum(y.sum(), "x") < 500.0, lambda y: y + 1, x)


def flow_scan_forward(x):
    def body(carry, row):
        total = lax.psum(row, "x")
        return carry + total + row, (total, lax.ppermute(carry, "x", SHIFT))

    return lax.scan(body, x[0] * 0, x)


def flow_scan_reverse_unrolled(x):
    def body(carry, row):
        return lax.ppermute(carry + row, "x", SHIFT), carry.sum()

    carry, sums = lax.scan(body, x[0], x, reverse=True, unroll=2)
    return carry, sums


def flow_cond_plain(x):
    return lax.cond(
        lax.psum(x.sum(), "x") > -1e6,
        lambda x: lax.ppermute(x, "x", SHIFT),
        lambda x: x * lax.psum(x, "x"),
        x,
    )


def flow_cond_in_loop(x):
    def body(i, y):
        return lax.cond(
            i % 2 == 0,
            lambda y: lax.ppermute(y, "x", SHIFT),
            lambda y: y + lax.psum(y, "x") * 0.5,
            y,
        )

    return lax.fori_loop(0, 4, body, x)


def flow_cond_without_collectives(x):
    """Each rank takes its own branch; the collective is after it."""
    y = lax.cond(lax.axis_index("x") == 0, lambda x: x * 3, lambda x: x - 1, x)
    return lax.psum(y, "x") + y


def flow_cond_of_three(x):
    return lax.switch(
        lax.pmax(x[0, 0], "x").astype(jnp.int32) % 3,
        [
            lambda x: lax.ppermute(x, "x", SHIFT),
            lambda x: x + lax.pmax(x, "x"),
            lambda x: x * lax.psum(x, "x"),
        ],
        x,
    )


def flow_nested_loops(x):
    def inner(_, y):
        return lax.ppermute(y, "x", SHIFT) + x

    def outer(carry, row):
        carry = lax.fori_loop(0, 2, inner, carry)
        carry = lax.while_loop(
            lambda y: lax.pmax(y.max(), "x") > 50, lambda y: y - lax.pmean(y, "x") - 5, carry
        )
        return carry + row, lax.psum(carry.sum(), "x")

    return lax.scan(outer, x, x)


def flow_map_rows(x):
    return lax.map(lambda row: row + lax.psum(row * 2, "x"), x)


def flow_map_of_batches(x):
    return lax.map(lambda row: row - lax.pmin(row, "x"), x, batch_size=2)


def flow_map_by_vmap(x):
    return jax.vmap(lambda row: lax.ppermute(row, "x", SHIFT) + lax.psum(row, "x"))(x)


def flow_call_of_jit(x):
    inner = jax.jit(lambda y: lax.psum(y, "x") + lax.ppermute(y, "x", SHIFT))
    return inner(x) + inner(x * 2)


def flow_fori_unequal_trips(x):
    """Loops of which each rank makes its own number of steps, without collectives inside."""
    steps = lax.axis_index("x") + 1
    y = lax.fori_loop(0, steps, lambda _, y: y * 2, x)
    return lax.psum(y, "x") + y


def flow_fori_long(x):
    return lax.fori_loop(0, 200, lambda _, y: lax.ppermute(y, "x", SHIFT) + 1, x)


def flow_many_independent(x):
    return [lax.psum(x * i, "x") if i % 2 else lax.ppermute(x * i, "x", SHIFT) for i in range(8)]


def flow_many_kinds(x):
    a = lax.psum(x, "x")
    b = lax.all_gather(x, "x")
    c = lax.psum_scatter(jnp.tile(x, (SIZE, 1)), "x", tiled=True)
    d = lax.all_to_all(jnp.tile(x, (SIZE, 1)), "x", 0, 0, tiled=True)
    return a, b, c, d, lax.pmax(x + c, "x") + b[0], lax.ppermute(d, "x", SHIFT)


def flow_call_in_a_long_chain(x):
    for i in range(15):
        x = lax.ppermute(x, "x", SHIFT) + lax.pmean(x, "x") if i % 3 == 0 else x * 0.5 + i
    return x


FLOWS: dict[str, Callable[..., Any]] = {
    name.removeprefix("flow_"): f for name, f in globals().items() if name.startswith("flow_")
}


@pytest.mark.parametrize("kind", dict.fromkeys(name.split("_")[0] for name in FLOWS))
def test_control_flow(kind: str) -> None:
    functions = {name: f for name, f in FLOWS.items() if name.split("_")[0] == kind}
    same(together(functions), numbers((SIZE * 3, 4)), tolerance=1e-5)
