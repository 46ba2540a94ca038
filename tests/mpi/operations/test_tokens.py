"""A token goes wherever an array can, and operations inside use and change it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
X = jnp.arange(3.0)


def step(x, token):
    y, token = m.allreduce(x, m.SUM, token=token)
    return y / SIZE + 1, token


def test_returned_from_jit_and_passed_on() -> None:
    f = jax.jit(step)
    x, token = f(X, m.create_token())
    x, token = f(x, token)
    token.block_until_ready()
    np.testing.assert_allclose(x, X + 2)


def test_carried_by_scan() -> None:
    def body(carry, _):
        return step(*carry), carry[0]

    (x, _token), ys = jax.jit(lambda x: jax.lax.scan(body, (x, m.create_token()), length=5))(X)
    np.testing.assert_allclose(x, X + 5)
    np.testing.assert_allclose(ys[3], X + 3)


def test_carried_by_fori_loop() -> None:
    run = jax.jit(lambda x, t: jax.lax.fori_loop(0, 4, lambda i, c: step(*c), (x, t)))
    x, _token = run(X, m.create_token())
    np.testing.assert_allclose(x, X + 4)


def test_carried_by_while_loop_with_an_operation_in_the_body() -> None:
    def body(carry):
        x, token, i = carry
        x, token = step(x, token)
        nt.barrier()
        return x, token, i + 1

    run = jax.jit(lambda x: jax.lax.while_loop(lambda c: c[2] < 3, body, (x, m.create_token(), 0)))
    np.testing.assert_allclose(run(X)[0], X + 3)


def test_given_back_by_both_branches_of_cond() -> None:
    @jax.jit
    def run(flag, x, token):
        def quiet(x, token):
            return x, token

        x, token = jax.lax.cond(flag, step, quiet, x, token)
        return step(x, token)

    np.testing.assert_allclose(run(True, X, m.create_token())[0], X + 2)
    np.testing.assert_allclose(run(False, X, m.create_token())[0], X + 1)


def test_different_operations_in_both_branches() -> None:
    @jax.jit
    def run(flag, x):
        return jax.lax.cond(
            flag, lambda x: nt.allreduce(x, m.SUM), lambda x: nt.allgather(x).max(0) * 10, x
        )

    np.testing.assert_allclose(run(True, X), X * SIZE)
    np.testing.assert_allclose(run(False, X), X * 10)


@pytest.mark.rule
def test_through_grad_and_remat() -> None:
    def loss(x):
        token = m.create_token()
        y, token = m.allreduce(x**2, m.SUM, token=token)
        z, token = m.allreduce(y, m.SUM, token=token)
        return z.sum() / SIZE

    expected = 2 * X / SIZE
    np.testing.assert_allclose(jax.grad(loss)(X), expected)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(X), expected)


@pytest.mark.rule
def test_through_vmap() -> None:
    def one(x):
        x, token = step(x, m.create_token())
        return step(x, token)

    x, _tokens = jax.vmap(one)(jnp.stack([X, X * 2]))
    np.testing.assert_allclose(x, np.stack([X, X * 2]) + 2)


@pytest.mark.rule
def test_grad_of_scan() -> None:
    def loss(x):
        def body(carry, _):
            return step(*carry), None

        return jax.lax.scan(body, (x, m.create_token()), length=3)[0][0].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(X), np.full(3, 1 / SIZE**3), rtol=1e-6)


def test_none_and_jax_tokens_are_accepted() -> None:
    y, _token = m.allreduce(X, m.SUM, token=None)
    y, _token = m.allreduce(y, m.SUM, token=jax.lax.create_token())
    np.testing.assert_allclose(y, X * SIZE**2)
    y = jax.jit(lambda x: m.allreduce(x, m.SUM, token=jax.lax.create_token())[0])(X)
    np.testing.assert_allclose(y, X * SIZE)


def test_other_tokens_are_refused() -> None:
    with pytest.raises(TypeError, match="token must be"):
        m.barrier(token=jnp.zeros(3))
    with pytest.raises(RuntimeError, match="takes no token"):
        nt.barrier(token=None)
