"""Derivatives where ranks differ in what is constant: they take the same derivatives all the same.

Left to itself, JAX leaves out the derivative of what is constant on one rank, and others wait for
it or meet another message. Loops keep their operations.
"""

from __future__ import annotations

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
W = jnp.arange(1.0, 3.0) + RANK
ALL = np.stack([np.arange(1.0, 3.0) + rank for rank in range(SIZE)])
ONES = jnp.ones(2)


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> None:
    """A message left over would be taken by the next operation."""
    yield
    np.testing.assert_array_equal(nt.allgather(jnp.int32(RANK)), np.arange(SIZE))
    rows = jnp.full((SIZE, 2), 7.0) if RANK == 0 else ONES
    np.testing.assert_array_equal(nt.scatter(rows, 0), [7, 7])
    np.testing.assert_array_equal(nt.sendrecv(W, W, PREVIOUS, NEXT), ALL[PREVIOUS])


def on_root(y, loss):
    """A loss on rank 0 alone."""
    return loss(y) if RANK == 0 else jnp.zeros(())


def total(x):
    """The sum over ranks, with the exact adjoint."""
    return nt.bcast(nt.reduce(x, m.SUM, 0), 0)


def test_second_derivatives_of_a_loss_on_the_root() -> None:
    def loss(w):
        return on_root(nt.gather(w**2, 0), lambda y: jnp.sum(y**2))

    np.testing.assert_allclose(jax.grad(loss)(W), 4 * W**3)
    np.testing.assert_allclose(jax.jvp(jax.grad(loss), (W,), (ONES,))[1], 12 * W**2)
    np.testing.assert_allclose(jax.hessian(loss)(W), np.diag(12 * W**2))


def test_derivatives_of_the_exact_sum() -> None:
    def loss(w):
        return 0.5 * jnp.sum(total(w) ** 2)

    np.testing.assert_allclose(jax.jacrev(total)(W), SIZE * np.eye(2))
    np.testing.assert_allclose(jax.grad(loss)(W), SIZE * ALL.sum(0))
    np.testing.assert_allclose(jax.hessian(loss)(W), SIZE**2 * np.eye(2))
    twice = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(W)
    np.testing.assert_allclose(twice, 2 * SIZE**3 * SIZE * ALL.sum(0) / SIZE)


@pytest.mark.parametrize("elsewhere", ["linear", "unused", "nothing"])
def test_second_derivatives_where_a_rank_has_another_loss(elsewhere: str) -> None:
    def loss(w):
        y = nt.allgather(w**2)
        if RANK == 0:
            return jnp.sum(y**2)
        return {"linear": jnp.sum(y), "unused": jnp.sum(w * 0), "nothing": jnp.zeros(())}[elsewhere]

    second = 12 * W**2 + (2 * (SIZE - 1) if elsewhere == "linear" else 0)
    np.testing.assert_allclose(jax.jvp(jax.grad(loss), (W,), (ONES,))[1], second)
    np.testing.assert_allclose(jax.hessian(loss)(W), np.diag(second))


def test_batches_of_gradients() -> None:
    batch = jnp.stack([W, 2 * W])

    def gathered(w):
        y = nt.allgather(w)
        return jnp.sum(y**2) if RANK == 0 else jnp.sum(y)

    np.testing.assert_allclose(jax.vmap(jax.grad(gathered))(batch), 2 * batch + SIZE - 1)

    def exchanged(w):
        y = nt.sendrecv(w, w, PREVIOUS, NEXT)
        return jnp.sum(y**2) if RANK == 0 else jnp.sum(y)

    expected = 2 * batch if NEXT == 0 else jnp.ones_like(batch)
    np.testing.assert_allclose(jax.vmap(jax.grad(exchanged))(batch), expected)


IN_A_CALL = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda x: lax.cond(True, f, lambda x: x, x),
}


@pytest.mark.parametrize("call", IN_A_CALL)
def test_a_placeholder_where_the_operand_does_not_matter(call: str) -> None:
    bcast = IN_A_CALL[call](lambda x: nt.bcast(x, 0))

    def loss(w):
        return jnp.sum(bcast(w if RANK == 0 else jnp.zeros(2)) * w)

    expected = ALL.sum(0) + ALL[0] if RANK == 0 else ALL[0]
    np.testing.assert_allclose(jax.grad(loss)(W), expected)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(W), expected)
    tangent = jax.jvp(lambda w: bcast(w if RANK == 0 else jnp.zeros(2)), (W,), (ONES,))[1]
    np.testing.assert_allclose(tangent, ONES)


def test_an_exchange_of_what_is_constant_on_one_rank() -> None:
    def loss(w):
        y = nt.sendrecv(w if RANK == 0 else jnp.ones(2), w, PREVIOUS, NEXT)
        return jnp.sum(y * w)

    received = ALL[0] if PREVIOUS == 0 else np.ones(2)
    expected = received + (ALL[NEXT] if RANK == 0 else 0)
    np.testing.assert_allclose(jax.grad(loss)(W), expected)


def test_a_placeholder_in_a_loop() -> None:
    def loss(w):
        def body(carry, _):
            return nt.bcast(carry if RANK == 0 else jnp.zeros(2), 0) * w, None

        return jnp.sum(lax.scan(body, w, None, length=2)[0])

    # After two steps the carry is w₀² w on every rank.
    expected = 2 * ALL[0] * ALL.sum(0) + ALL[0] ** 2 if RANK == 0 else ALL[0] ** 2
    np.testing.assert_allclose(jax.grad(loss)(W), expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_loops_that_are_differentiated_keep_their_messages(wrap) -> None:
    """JAX would receive once, for all iterations, and forget what is sent."""
    steps = 3

    def loss(w):
        def body(carry, i):
            if RANK == 0:
                nt.send(jnp.full(2, 5.0) + lax.stop_gradient(i), 1, tag=1)
            elif RANK == 1:
                carry = carry * lax.stop_gradient(nt.recv(ONES, 0, tag=1))
            jax.jit(nt.barrier)()
            return carry, None

        return jnp.sum(lax.scan(body, w, jnp.arange(float(steps)))[0])

    gradient = jax.grad(wrap(loss))(W)
    np.testing.assert_allclose(gradient, np.full(2, 5.0 * 6 * 7 if RANK == 1 else 1.0))


def test_second_derivatives_of_allreduce_with_the_loss_on_the_root() -> None:
    """Its transpose is the identity, whose transpose is the sum, on every rank."""

    def loss(w):
        return on_root(nt.allreduce(w, m.SUM), lambda y: jnp.sum(y**3))

    sums = ALL.sum(0)
    np.testing.assert_allclose(jax.grad(loss)(W), 3 * sums**2 if RANK == 0 else 0 * sums)
    twice = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w)))(W)
    assert twice.shape == (2,)
    second = jax.jvp(jax.grad(loss), (W,), (ONES,))[1]
    np.testing.assert_allclose(second, 6 * sums * SIZE if RANK == 0 else 0 * sums)


def test_callbacks_are_left_as_they_are() -> None:
    """They have the operations' effect, and JAX has no derivative of them."""
    seen: list[float] = []

    @jax.jit
    def note(x):
        jax.experimental.io_callback(lambda x: seen.append(float(x[0])), None, x, ordered=True)
        return x

    def loss(w):
        return jnp.sum(note(ONES * 3) * nt.allgather(w)[0])

    # Of rank 0, the sum of all ranks' losses.
    np.testing.assert_allclose(jax.grad(loss)(W), ONES * 3 * SIZE if RANK == 0 else 0 * ONES)
    jax.effects_barrier()
    assert seen == [3.0]


def test_an_exchange_from_any_source_of_what_is_constant() -> None:
    def loss(w):
        return jnp.sum(nt.sendrecv(lax.stop_gradient(w), ONES, m.ANY_SOURCE, NEXT) * w)

    np.testing.assert_allclose(jax.grad(loss)(W), ALL[PREVIOUS])


def test_what_is_constant_on_all_ranks_may_go_through_what_has_no_derivative() -> None:
    largest = jax.jit(lambda x: nt.allreduce(x, m.MAX))

    @jax.jit
    def until_large(x):
        return lax.while_loop(lambda x: x[0] < 100, lambda x: nt.allreduce(x, m.SUM) + 1, x)

    def loss(w):
        constant = lax.stop_gradient(w)
        return jnp.sum(w * largest(constant)) + jnp.sum(w * until_large(constant) * 0)

    np.testing.assert_allclose(jax.grad(loss)(W), ALL[SIZE - 1])


def test_integers_have_no_tangents() -> None:
    counts = jnp.arange(2) + RANK

    def loss(w):
        y = nt.sendrecv(counts, counts, PREVIOUS, NEXT)
        return jnp.sum(y * w)

    np.testing.assert_allclose(jax.grad(loss)(W), np.arange(2) + PREVIOUS)

    def rounded(w):
        whole = w.astype(int)
        return nt.sendrecv(whole, whole, PREVIOUS, NEXT)

    assert jax.jvp(rounded, (W,), (ONES,))[1].dtype == jax.dtypes.float0
    np.testing.assert_allclose(jax.grad(lambda w: jnp.sum(rounded(w) * 1.0))(W), np.zeros(2))
