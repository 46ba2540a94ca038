"""Derivatives and vmap of collectives that are started: what the blocking ones give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nonblocking_calls import CALLS, RANK, SIZE, X

import mpi_cuda as m
from mpi_cuda import notoken as nt

pytestmark = pytest.mark.rule


def _losses(style: Callable[..., Any]) -> Callable[..., Any]:
    """Of a dict of operands, the sum of squares of what all collectives that are linear give."""

    def loss(operands):
        total = 0.0
        for name, x in operands.items():
            y = style(name)(x, *CALLS[name][1:])
            total += (y * y).sum()
        return total

    return loss


def _blocking(name: str) -> Callable[..., Any]:
    return getattr(nt, name)


def _started(name: str) -> Callable[..., Any]:
    return lambda *call: nt.wait(getattr(nt, f"i{name}")(*call))


OPERANDS = {name: call[0] for name, call in CALLS.items()}


def test_derivatives_are_those_of_the_blocking_ones() -> None:
    both = []
    for style in (_blocking, _started):
        loss = _losses(style)

        @jax.jit
        def derivatives(operands, loss=loss):
            forward = jax.jvp(loss, (operands,), (operands,))[1]
            return jax.grad(loss)(operands), forward

        both.append(derivatives(OPERANDS))
    jax.tree.map(np.testing.assert_allclose, *both)
    transposed = [
        jax.linear_transpose(lambda x, style=style: style("scan")(x, m.SUM), X)(X)[0]
        for style in (_blocking, _started)
    ]
    np.testing.assert_array_equal(*transposed)
    # Outside of jit, and where a rank passes a constant.
    placeholder = jnp.zeros(3)

    def of_the_root(x):
        return (nt.wait(nt.ibcast(x if RANK == 0 else placeholder, 0)) * (RANK + 1)).sum()

    expected = SIZE * (SIZE + 1) / 2 if RANK == 0 else 0
    np.testing.assert_array_equal(jax.grad(of_the_root)(jnp.ones(3)), np.full(3, expected))
    with pytest.raises(
        NotImplementedError, match=r"iallreduce can be differentiated only with SUM"
    ):
        jax.grad(lambda x: nt.wait(nt.iallreduce(x, m.MAX)).sum())(X)


def test_a_request_with_derivatives_goes_where_arrays_can() -> None:
    """Carried by a loop, given back by a branch, out of a program."""

    def loss(start, end):
        def loss(x):
            def body(carry, _):
                request, x = carry
                x = jnp.sin(end(request) / SIZE + x)
                return (start(x), x), None

            (last, x), _ = jax.lax.scan(body, (start(x), x), length=3)
            branch = jax.lax.cond(x.sum() > 0, lambda: start(x), lambda: start(2 * x))
            out = jax.jit(start)(x * x)
            return sum((end(request) ** 2).sum() for request in (last, branch, out))

        return loss

    blocking = loss(lambda x: nt.scan(x, m.SUM), lambda y: y)
    started = loss(lambda x: nt.iscan(x, m.SUM), nt.wait)
    x = jnp.arange(3.0) + RANK
    np.testing.assert_allclose(started(x), blocking(x), rtol=1e-6)
    expected = jax.jit(jax.grad(blocking))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(started))(x), expected, rtol=1e-5)


def test_batches_are_one_collective() -> None:
    """And derivatives of them; in these the batch goes to other places of operand and result."""
    batch = {name: jnp.stack([x, 2 * x, 3 * x], axis=1) for name, x in OPERANDS.items()}
    some = {name: batch[name] for name in ("allgather", "alltoall", "reduce_scatter", "scatter")}

    def everything(style):
        def run(operands):
            return {name: style(name)(x, *CALLS[name][1:]) for name, x in operands.items()}

        @jax.jit
        def batched(batch, some):
            loss = _losses(style)
            of_all = jax.grad(lambda operands: jax.vmap(loss, 1)(operands).sum())(some)
            of_each = jax.vmap(jax.grad(loss), in_axes=1)({"allgather": some["allgather"]})
            return jax.vmap(run, in_axes=1)(batch), of_all, of_each

        return batched(batch, some)

    jax.tree.map(np.testing.assert_allclose, everything(_blocking), everything(_started))


def test_ranks_may_wait_in_any_order() -> None:
    """Derivatives belong to what was started, whoever waits first, and before or after others."""
    reduced = m.SUM

    def losses(x, in_order):
        sums = nt.iallreduce(x, reduced), nt.iallreduce(10 * x, reduced)
        others = nt.iscan(x * x, reduced), nt.iallgather(3 * x), nt.iallreduce(x * x * x, reduced)
        requests = (*sums, *others)
        ended: dict[int, Any] = {}
        if not in_order:
            ended[1] = nt.wait(requests[1])
        between = nt.allreduce(100 * x, reduced)
        for index in range(5) if in_order else (4, 0, 3, 2):
            ended[index] = nt.wait(requests[index])
        assert len(ended) == 5
        return [*(ended[index].sum() for index in range(5)), between.sum()]

    def derivatives(style, *style_arguments):
        def loss(x):
            return sum((k + 1.0) * value for k, value in enumerate(style(x, *style_arguments)))

        forward = jax.jvp(lambda x: style(x, *style_arguments), (x,), (x + 1,))[1]
        return forward, jax.grad(loss)(x)

    def blocking(x):
        return [
            nt.allreduce(x, reduced).sum(),
            nt.allreduce(10 * x, reduced).sum(),
            nt.scan(x * x, reduced).sum(),
            nt.allgather(3 * x).sum(),
            nt.allreduce(x * x * x, reduced).sum(),
            nt.allreduce(100 * x, reduced).sum(),
        ]

    x = jnp.arange(3.0) + RANK
    expected = derivatives(blocking)
    for run in (derivatives, jax.jit(derivatives, static_argnums=(0, 1))):
        jax.tree.map(np.testing.assert_allclose, run(losses, RANK % 2 == 0), expected)


def test_a_checkpoint_starts_again() -> None:
    def gradient(style):
        return jax.jit(jax.grad(lambda x: jax.checkpoint(lambda x: style(x) ** 2)(x).sum()))(X)

    started = gradient(lambda x: nt.wait(nt.iscan(x, m.SUM)))
    np.testing.assert_allclose(started, gradient(lambda x: nt.scan(x, m.SUM)))


def test_inside_of_a_loop_whose_length_data_decides() -> None:
    def steps(style):
        def loop(x):
            def body(carry):
                step, x = carry
                return step + 1, style(x) / SIZE + x / 2

            return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

        return jax.jit(lambda x: jax.jvp(loop, (x,), (2 * x,)))(X)

    started = steps(lambda x: nt.wait(nt.iscan(x, m.SUM)))
    jax.tree.map(np.testing.assert_allclose, started, steps(lambda x: nt.scan(x, m.SUM)))
