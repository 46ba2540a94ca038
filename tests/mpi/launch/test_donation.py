"""Donation is done when a program is dispatched, on every rank alike, wherever one runs ahead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
COMM = MPI.COMM_WORLD
X = jnp.arange(3.0)
COUNT = 60

pytestmark = pytest.mark.skipif(SIZE == 1, reason="nobody to run ahead of")


def start_late() -> None:
    """Rank 0 dispatches while the others wait for it here, so its launches wait for theirs."""
    if RANK:
        assert COMM.recv(source=0) == "dispatched"


def dispatched() -> None:
    if RANK == 0:
        for rank in range(1, SIZE):
            COMM.send("dispatched", rank)


def refused(use) -> str:
    with pytest.raises((RuntimeError, ValueError)) as error:
        use()
    return str(error.value)


def test_what_a_deferred_launch_donates_is_deleted_at_once() -> None:
    add = jax.jit(lambda w, x: nt.allreduce(x, m.SUM) + w, donate_argnums=0)
    other = jax.jit(lambda x: x * 2)
    w, old = add(X + 0, X + 1), []
    start_late()
    for _ in range(COUNT):
        old.append(w)
        w = add(w, X)
        assert old[-1].is_deleted()
    # XLA:GPU has words of its own for it, and JAX 0.12 other ones.
    again = refused(lambda: add(old[-1], X))
    assert "deleted" in again or "Donation requested for invalid buffer" in again
    assert "deleted" in refused(lambda: old[-1].block_until_ready())
    assert "deleted" in refused(lambda: other(old[-1]))
    assert "deleted" in refused(lambda: np.asarray(old[-1]))
    assert "deleted" in refused(lambda: jax.device_put(old[-1], jax.local_devices()[0]))
    assert not w.is_deleted()
    dispatched()
    np.testing.assert_allclose(w, X + (X + 1) * SIZE + X * SIZE * COUNT)
    assert all(array.is_deleted() for array in old)


def test_what_is_donated_of_a_program_for_all_devices() -> None:
    mesh = jax.make_mesh((SIZE,), ("x",))
    replicated = jax.NamedSharding(mesh, jax.P())
    x = jax.device_put(jnp.ones(4 * SIZE), jax.NamedSharding(mesh, jax.P("x")))
    step = jax.jit(lambda w, x: w + x.sum() / x.size, donate_argnums=0, out_shardings=replicated)
    w = step(jax.device_put(jnp.zeros(3), replicated), x)
    w.block_until_ready()
    start_late()
    for _ in range(COUNT):
        old, w = w, step(w, x)
        assert old.is_deleted()
    assert "deleted" in refused(lambda: jax.jit(lambda x: x * 2)(old))
    dispatched()
    np.testing.assert_allclose(w, np.full(3, COUNT + 1.0))


def test_an_array_that_numpy_still_views_is_copied_and_lives() -> None:
    """As XLA's CPU backend does it, whichever rank runs ahead."""
    add = jax.jit(lambda w, x: nt.allreduce(x, m.SUM) + w, donate_argnums=0)
    w = X + 5
    view = np.asarray(w)
    gone = X + 6
    start_late()
    results = [add(X + 0, X) for _ in range(COUNT)]
    results.append(add(w, X))
    lives = not w.is_deleted()
    results.append(add(gone, X))
    assert gone.is_deleted()
    again = jax.jit(lambda x: x + 1)(w) if lives else None
    dispatched()
    np.testing.assert_allclose(results[-2], X * SIZE + X + 5)
    assert lives == (jax.default_backend() == "cpu")
    if lives:
        np.testing.assert_allclose(again, X + 6)
    np.testing.assert_allclose(view, X + 5)


def test_one_array_cannot_be_donated_and_used_by_one_launch() -> None:
    add = jax.jit(lambda w, x: nt.allreduce(x, m.SUM) + w, donate_argnums=0)
    start_late()
    results = [add(X + 0, X) for _ in range(COUNT)]
    twice = X + 1
    assert "donate" in refused(lambda: add(twice, twice))
    dispatched()
    np.testing.assert_allclose(results[-1], X * SIZE + X)


def test_nobody_waits_for_a_launch_that_was_refused() -> None:
    """Its rank had arrived there, and the next launch is of the same operations."""
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    add = jax.jit(lambda w, x: nt.allreduce(x, m.SUM) + w, donate_argnums=0)
    for _ in range(20):
        add(X + 0, X).block_until_ready()
        twice = X + 1
        assert "donate" in refused(lambda twice=twice: add(twice, twice))
        start_late()
        result = total(X)
        dispatched()
        np.testing.assert_allclose(result, X * SIZE)


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
def test_the_error_of_a_deferred_launch_reaches_everything_that_depends_on_it() -> None:
    """Launches behind it get an input that has failed already, and have no memory for results."""
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def raise_it(_):
        raise ValueError("raised in a deferred launch")

    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    fail = jax.jit(lambda x: jax.pure_callback(raise_it, shape, x))
    start_late()
    results = [total(X) for _ in range(COUNT)]
    if RANK == 0:
        depends = fail(X)
        for _ in range(COUNT):
            depends = add(depends)
    results.extend(total(X + 1) for _ in range(COUNT))
    dispatched()
    np.testing.assert_allclose(results[-1], (X + 1) * SIZE)
    for _ in range(2 if RANK == 0 else 0):
        assert "raised in a deferred launch" in refused(lambda: np.asarray(depends))
        assert "raised in a deferred launch" in refused(depends.block_until_ready)
    np.testing.assert_allclose(total(X), X * SIZE)
