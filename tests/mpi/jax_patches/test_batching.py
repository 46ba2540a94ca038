"""vmap of every operation, over any axis, nested: one operation for the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

pytestmark = pytest.mark.rule
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
LAST = SIZE - 1
ROWS = (SIZE, 2)
COUNTS = tuple((3 * rank + 1) % 4 for rank in range(SIZE))
SENT = [(2 * RANK + 3 * other) % 4 for other in range(SIZE)]
RECEIVED = [(2 * other + 3 * RANK) % 4 for other in range(SIZE)]


def send_and_receive(x):
    """Around the ring; rank 0 sends first."""
    if RANK == 0:
        nt.send(x, NEXT, tag=1)
        return nt.recv(x, PREVIOUS, tag=1)
    y = nt.recv(x, PREVIOUS, tag=1)
    nt.send(x, NEXT, tag=1)
    return y


def in_halves(x):
    coming = nt.irecv(x, PREVIOUS)
    nt.wait(nt.isend(x, NEXT))
    return nt.wait(coming)


def synchronized(x):
    nt.barrier()
    return x + 1


# Every operation, with the shape of its operand.
OPERATIONS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "allgather": (nt.allgather, (3, 2)),
    "allgatherv": (lambda x: nt.allgatherv(x, COUNTS), (COUNTS[RANK], 2)),
    "allreduce": (lambda x: nt.allreduce(x, m.SUM), (3, 2)),
    "alltoall": (nt.alltoall, ROWS),
    "alltoallv": (lambda x: nt.alltoallv(x, SENT, RECEIVED), (sum(SENT), 2)),
    "barrier": (synchronized, (3,)),
    "bcast": (lambda x: nt.bcast(x, LAST), (4,)),
    "exscan": (lambda x: nt.exscan(x, m.SUM), (3,)),
    "gather": (lambda x: nt.gather(x, LAST), (2, 3)),
    "gatherv": (lambda x: nt.gatherv(x, COUNTS, LAST), (COUNTS[RANK], 2)),
    "isend, irecv, wait": (in_halves, (2, 3)),
    "reduce": (lambda x: nt.reduce(x, m.MAX, LAST), (5,)),
    "reduce_scatter": (lambda x: nt.reduce_scatter(x, m.SUM), ROWS),
    "scan": (lambda x: nt.scan(x, m.SUM), (3,)),
    "scatter": (lambda x: nt.scatter(x, 0), ROWS if RANK == 0 else (2,)),
    "scatterv": (
        lambda x: nt.scatterv(x, COUNTS, 0),
        (sum(COUNTS) if RANK == 0 else COUNTS[RANK], 2),
    ),
    "send, recv": (send_and_receive, (2, 2)),
    "sendrecv_replace": (lambda x: nt.sendrecv_replace(x, PREVIOUS, NEXT), (3, 2)),
    "sendrecv": (lambda x: nt.sendrecv(x, x, PREVIOUS, NEXT), (3, 2)),
}


def batch(shape: tuple[int, ...], *sizes: int) -> np.ndarray:
    random = np.random.default_rng(RANK)
    return random.integers(0, 9, (*sizes, *shape)).astype(np.float32)


def one_by_one(function: Callable, xs: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(function(jnp.asarray(x))) for x in xs])


@pytest.mark.parametrize("name", OPERATIONS)
def test_over_any_axis(name: str) -> None:
    function, shape = OPERATIONS[name]
    xs = batch(shape, 3)
    expected = one_by_one(function, xs)
    # Of the same number on every rank, since they are operations of all.
    for step in range(3):
        axis, out = step % (len(shape) + 1), step % expected.ndim
        got = jax.vmap(function, in_axes=axis, out_axes=out)(np.moveaxis(xs, 0, axis))
        np.testing.assert_array_equal(np.moveaxis(got, out, 0), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_nested(name: str) -> None:
    function, shape = OPERATIONS[name]
    xs = batch(shape, 2, 3)
    expected = np.stack([one_by_one(function, x) for x in xs])
    # The outer batch is in axis 1 of the operand, the inner one last in what remains.
    nested = jax.jit(jax.vmap(jax.vmap(function, in_axes=-1), in_axes=1))
    got = nested(np.moveaxis(xs, (0, 1), (1, -1)))
    np.testing.assert_array_equal(got, expected)


def test_one_operation_for_the_whole_batch() -> None:
    program = jax.jit(jax.vmap(lambda x: nt.allreduce(x, m.SUM)))
    assert program.lower(jnp.ones((5, 2))).as_text().count("custom_call @mpi_cuda_") == 1


def test_loops_and_branches_whose_predicate_is_not_batched() -> None:
    def count(x, limit):
        def body(carry):
            i, y = carry
            return i + 1, nt.allreduce(y, m.SUM) / SIZE + 1

        return jax.lax.while_loop(lambda carry: carry[0] < limit, body, (0, x))[1]

    def choose(x, flag):
        return jax.lax.cond(flag, lambda: nt.allreduce(x, m.SUM), lambda: nt.exscan(x, m.SUM) - x)

    xs = jnp.arange(6.0).reshape(3, 2)
    for limit in (0, 3):
        got = jax.jit(jax.vmap(count, in_axes=(1, None)))(xs, limit)
        np.testing.assert_allclose(got, xs.T + limit)
    for flag, expected in ((True, xs * SIZE), (False, xs * RANK - xs)):
        np.testing.assert_allclose(jax.vmap(choose, in_axes=(0, None))(xs, flag), expected)
        nested = jax.vmap(jax.vmap(choose, in_axes=(0, None)), in_axes=(0, None))
        np.testing.assert_allclose(jax.jit(nested)(xs, flag), expected)


@pytest.mark.parametrize("kind", ["cond", "while_loop"])
def test_a_batched_predicate_is_refused(kind: str) -> None:
    def branch(x):
        if kind == "cond":
            return jax.lax.cond(x > 1, lambda: nt.allreduce(x, m.SUM), lambda: x)
        return jax.lax.while_loop(lambda y: y < 3, lambda y: nt.allreduce(y, m.SUM) + 1, x)

    with pytest.raises(NotImplementedError, match=f"allreduce inside a {kind} whose predicate"):
        jax.vmap(branch)(jnp.arange(3.0))
