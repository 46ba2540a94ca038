"""Derivatives: tangents are the operation itself, transposes the adjoint over all ranks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

COMM = MPI.COMM_WORLD
pytestmark = pytest.mark.rule
RANK, SIZE = COMM.rank, COMM.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
LAST = SIZE - 1

ROWS = (SIZE, 2)
COUNTS = tuple((3 * rank + 1) % 4 for rank in range(SIZE))
SENT = [(2 * RANK + 3 * other) % 4 for other in range(SIZE)]
RECEIVED = [(2 * other + 3 * RANK) % 4 for other in range(SIZE)]
# Whose operands have another size on each rank.
UNEVEN = ("allgatherv", "alltoallv", "gatherv", "scatter", "scatterv")
LIKE = jax.ShapeDtypeStruct((3,), np.float32)


def around(x: jax.Array) -> jax.Array:
    nt.send(x, NEXT, tag=4, paired=True)
    return nt.recv(x, PREVIOUS, tag=4, paired=True)


# Every linear operation, with the shape of its operand.
LINEAR = {
    "allgather": (nt.allgather, (3, 2)),
    "allgatherv": (lambda x: nt.allgatherv(x, COUNTS), (COUNTS[RANK], 2)),
    "alltoall": (nt.alltoall, ROWS),
    "alltoallv": (lambda x: nt.alltoallv(x, SENT, RECEIVED), (sum(SENT), 2)),
    "bcast": (lambda x: nt.bcast(x, LAST), (4,)),
    "exscan": (lambda x: nt.exscan(x, m.SUM), (3,)),
    "gather": (lambda x: nt.gather(x, LAST), (2, 3)),
    "gatherv": (lambda x: nt.gatherv(x, COUNTS, LAST), (COUNTS[RANK], 2)),
    "reduce": (lambda x: nt.reduce(x, m.SUM, LAST), (5,)),
    "reduce_scatter": (lambda x: nt.reduce_scatter(x, m.SUM), ROWS),
    "scan": (lambda x: nt.scan(x, m.SUM), (3,)),
    "scatter": (lambda x: nt.scatter(x, 0), ROWS if RANK == 0 else (2,)),
    "scatterv": (
        lambda x: nt.scatterv(x, COUNTS, 0),
        (sum(COUNTS) if RANK == 0 else COUNTS[RANK], 2),
    ),
    "send and recv": (around, (3,)),
    "sendrecv": (lambda x: nt.sendrecv(x, x, PREVIOUS, NEXT, sendtag=1, recvtag=1), (3,)),
    "sendrecv_replace": (lambda x: nt.sendrecv_replace(x, PREVIOUS, NEXT), (3,)),
    "sendrecv at ends": (
        lambda x: nt.sendrecv(
            x,
            x,
            RANK - 1 if RANK else m.PROC_NULL,
            RANK + 1 if RANK < LAST else m.PROC_NULL,
        ),
        (3,),
    ),
}


# NumPy's, since JAX would compile programs for each shape.
def random(shape: tuple[int, ...], seed: int, rank: int = RANK) -> jax.Array:
    numbers = np.random.default_rng([seed, rank])
    return jnp.asarray(numbers.standard_normal(shape, np.float32))


def inner(x: jax.Array, y: jax.Array) -> float:
    """The scalar product over all ranks."""
    return COMM.allreduce(float(np.vdot(x, y)))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_transposes_are_adjoints(name: str, jit: bool) -> None:
    function, shape = LINEAR[name]
    if jit:
        function = jax.jit(function)
    x = random(shape, 1)
    y, pull = jax.vjp(function, x)
    ct = random(y.shape, 2)
    (back,) = pull(ct)
    assert back.shape == x.shape
    np.testing.assert_allclose(inner(y, ct), inner(x, back), rtol=1e-5)
    (transposed,) = jax.linear_transpose(function, x)(ct)
    np.testing.assert_allclose(transposed, back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_tangents_are_the_operation(name: str) -> None:
    function, shape = LINEAR[name]
    x, tangent = random(shape, 3), random(shape, 4)
    y, y_tangent = jax.jvp(function, (x,), (tangent,))
    np.testing.assert_array_equal(y, function(x))
    np.testing.assert_array_equal(y_tangent, function(tangent))


@pytest.mark.parametrize("name", LINEAR)
def test_transposes_of_batches_mixed_modes_and_remat(name: str) -> None:
    function, shape = LINEAR[name]
    xs = random((3, *shape), 5)

    def loss(x):
        return (function(x) ** 3).sum()

    gradient = jax.grad(loss)
    one_by_one = np.stack([gradient(x) for x in xs])
    # Each in one program, which compiles sooner than one for each step.
    batch = jax.jit(jax.vmap(gradient))(xs)
    np.testing.assert_allclose(batch, one_by_one, rtol=1e-5, atol=1e-5)
    in_one = jax.jit(jax.grad(lambda xs: jax.vmap(loss)(xs).sum()))(xs)
    np.testing.assert_allclose(in_one, one_by_one, rtol=1e-5, atol=1e-5)
    again = jax.grad(jax.checkpoint(loss))(xs[0])
    np.testing.assert_allclose(again, one_by_one[0], rtol=1e-5, atol=1e-5)
    # Forward over reverse: a Hessian-vector product is symmetric over all ranks.
    u, v = random(shape, 6), random(shape, 7)

    @jax.jit
    def product(x, vector):
        return jax.jvp(gradient, (x,), (vector,))[1]

    x = xs[0]
    np.testing.assert_allclose(inner(u, product(x, v)), inner(v, product(x, u)), rtol=1e-4)


@pytest.mark.parametrize("name", ["allreduce", *(name for name in LINEAR if name not in UNEVEN)])
def test_hessians(name: str) -> None:
    # Not where the operand, and so the batch that jacfwd makes, has another size on each rank.
    function, shape = LINEAR.get(name, (lambda x: nt.allreduce(x, m.SUM), (3,)))

    def loss(x: jax.Array) -> jax.Array:
        return (function(x**3) ** 2).sum()

    x, tangent = abs(random(shape, 5)), random(shape, 6, rank=0)
    found = jax.jit(jax.hessian(loss))(x)
    _, expected = jax.jvp(jax.grad(loss), (x,), (tangent,))
    np.testing.assert_allclose(
        np.tensordot(found, tangent, axes=tangent.ndim), expected, rtol=1e-4, atol=1e-4
    )


def along_the_ranks(x: jax.Array) -> jax.Array:
    """Each rank waits for the one before it."""
    y = x if RANK == 0 else x + 2 * nt.recv(x, RANK - 1, tag=1, paired=True)
    if RANK < LAST:
        nt.send(y, RANK + 1, tag=1, paired=True)
    return y


def in_another_order(x: jax.Array) -> jax.Array:
    nt.send(2 * x, NEXT, tag=1, paired=True)
    nt.send(3 * x * x, NEXT, tag=2, paired=True)
    second = nt.recv(x, PREVIOUS, tag=2, paired=True)
    return second + 5 * nt.recv(x, PREVIOUS, tag=1, paired=True)


def all_to_the_last(x: jax.Array, like: Any = None) -> jax.Array:
    """Of other ranks no result depends on what they send."""
    if SIZE == 1:
        return x
    if RANK < LAST:
        token = m.send(x * x, LAST, tag=3, paired=True)
        m.send(x, m.PROC_NULL, tag=3, paired=True, token=token)
        return jnp.zeros(3)
    return sum(
        (nt.recv(x if like is None else like, i, tag=3, paired=True) for i in range(LAST)),
        start=jnp.zeros(3),
    )


def in_a_loop(x: jax.Array) -> jax.Array:
    def body(carry, _):
        return 0.5 * around(carry * carry), all_to_the_last(carry)

    carry, parts = jax.lax.scan(body, x, None, length=3)
    return carry + parts.sum(0)


def in_a_branch(x: jax.Array) -> jax.Array:
    return jax.lax.cond(x.sum() < 1e9, lambda x: all_to_the_last(x, LIKE), lambda x: x, x)


def in_a_branch_without_result(x: jax.Array) -> jax.Array:
    """Where this rank only sends, the branches have constant results."""

    def communicate(x: jax.Array) -> jax.Array:
        y = all_to_the_last(x)
        return y if RANK == LAST else jnp.zeros(3)

    return jax.lax.cond(x.sum() < 1e9, communicate, lambda x: jnp.ones(3), x)


FUNCTIONS = (
    *(along_the_ranks, in_another_order, all_to_the_last, in_a_loop),
    *(in_a_branch, in_a_branch_without_result),
)


HOW = {
    "eager": lambda f: f,
    "jitted checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap": jax.vmap,
}


# A loop or branch whose predicate is batched is refused.
BRANCHES = (in_a_branch, in_a_branch_without_result)
PAIRED = [(f, how) for f in FUNCTIONS for how in HOW if how != "vmap" or f not in BRANCHES]


@pytest.mark.parametrize(("function", "how"), PAIRED)
def test_messages_whose_pairing_is_known(function: Any, how: str) -> None:
    function, shape = HOW[how](function), (2, 3) if how == "vmap" else (3,)
    x, tangent, ct, direction = (random(shape, seed) for seed in (20, 21, 22, 23))
    y, y_tangent = jax.jvp(function, (x,), (tangent,))
    value, pull = jax.vjp(function, x)
    np.testing.assert_allclose(value, y)
    back = pull(ct)[0]
    np.testing.assert_allclose(inner(y_tangent, ct), inner(tangent, back), rtol=1e-3, atol=1e-4)

    def gradient(x):
        return jax.grad(lambda x: (function(x) ** 2).sum())(x)

    def second(x, vector):
        return jax.jvp(gradient, (x,), (vector,))[1]

    if how == "vmap":
        second = jax.jit(second)
    # The second derivative is symmetric, and reverse over reverse is reverse over forward.
    forward, other = second(x, tangent), second(x, direction)
    np.testing.assert_allclose(
        inner(forward, direction), inner(other, tangent), rtol=1e-3, atol=1e-2
    )
    reverse = jax.grad(lambda x: jnp.vdot(gradient(x), tangent))(x)
    np.testing.assert_allclose(
        inner(reverse, direction), inner(forward, direction), rtol=1e-3, atol=1e-2
    )


def test_a_paired_receive_that_jax_takes_for_a_constant_is_refused() -> None:
    @jax.jit
    def function(x: jax.Array, take: jax.Array) -> jax.Array:
        def receive() -> jax.Array:
            return nt.recv(LIKE, PREVIOUS, tag=1, paired=True)

        return (x * jax.lax.cond(take, receive, lambda: jnp.zeros(3))).sum()

    with pytest.raises(NotImplementedError, match=r"paired=True in a cond that takes no array"):
        jax.grad(function)(jnp.ones(3), True)


def test_a_paired_receive_names_its_message() -> None:
    for source, tag in [(0, m.ANY_TAG), (m.ANY_SOURCE, 1)]:
        with pytest.raises(ValueError, match="must name its source and tag"):
            nt.recv(LIKE, source, tag=tag, paired=True)


def test_hessian_of_a_replicated_loss() -> None:
    x = jnp.arange(3.0) + 1
    found = jax.hessian(lambda x: (nt.allreduce(x**3, m.SUM) ** 2).sum())(x)
    np.testing.assert_allclose(found, jnp.diag(30.0 * SIZE * x**4), rtol=1e-6)


def test_tokens_pass_through() -> None:
    def loss(x):
        y, token = m.allgather(x, token=None)
        y, token = m.scan(y, m.SUM, token=token)
        return (y**2).sum()

    def without(x):
        return (nt.scan(nt.allgather(x), m.SUM) ** 2).sum()

    x = random((3,), 8)
    np.testing.assert_allclose(jax.grad(loss)(x), jax.grad(without)(x), rtol=1e-6)


def test_a_rank_that_does_not_use_its_result_takes_part() -> None:
    def loss(x):
        gathered = nt.gather(x, 0)
        return (gathered**2).sum() if RANK == 0 else 0.0 * x.sum()

    x = random((3,), 9)
    np.testing.assert_allclose(jax.grad(loss)(x), 2 * x, rtol=1e-6)


def test_replicated_and_local_losses() -> None:
    """docs/derivatives.md: where the factor of the number of ranks comes from."""
    w = jnp.float32(3.0)
    data = jnp.float32(RANK + 1)
    total = sum(range(1, SIZE + 1))

    # Every rank holds the same loss: the transpose of allreduce is the identity.
    replicated = jax.grad(lambda w: nt.allreduce(w * data, m.SUM))(w)
    np.testing.assert_allclose(nt.allreduce(replicated, m.SUM), total)
    # The loss is the sum of the ranks' parts: the exact adjoint counts every rank's use.
    local = jax.grad(lambda w: nt.bcast(w, 0) * data)(w)
    np.testing.assert_allclose(local, total if RANK == 0 else 0)
    # The exact adjoint of the sum over ranks counts each of the copies of the loss.
    exact = jax.grad(lambda w: nt.allgather(w * data).sum())(w)
    np.testing.assert_allclose(exact, SIZE * data)


def test_solvers_and_custom_rules() -> None:
    """A distributed matrix of block columns, solved by conjugate gradients."""
    n = 2 * SIZE
    a = np.asarray(random((n, n), 0, rank=0))
    a = a @ a.T + n * np.eye(n, dtype=np.float32)
    mine = jnp.asarray(a[:, 2 * RANK : 2 * RANK + 2])
    b = jnp.arange(1.0, n + 1)

    def matvec(x):
        return nt.allreduce(mine @ x[2 * RANK : 2 * RANK + 2], m.SUM)

    def solve(b):
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-7)[0]

    np.testing.assert_allclose(jax.jit(solve)(b), np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)

    @jax.custom_vjp
    def total(x):
        return nt.allreduce(x, m.SUM)

    total.defvjp(lambda x: (total(x), None), lambda _, ct: (nt.allreduce(ct, m.SUM),))
    np.testing.assert_allclose(jax.grad(lambda x: total(x).sum())(b), np.full(n, SIZE))

    @jax.custom_jvp
    def doubled(x):
        return 2 * nt.allreduce(x, m.SUM)

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), doubled(*tangents)))
    _, tangent = jax.jvp(doubled, (b,), (b,))
    np.testing.assert_allclose(tangent, 2 * SIZE * b)


def test_what_is_not_linear_is_refused_by_name() -> None:
    x = random((3,), 10)
    for name, function in {
        "allreduce.*MAX": lambda x: nt.allreduce(x, m.MAX),
        "reduce.*PROD": lambda x: nt.reduce(x, m.PROD, 0),
        "scan.*MIN": lambda x: nt.scan(x, m.MIN),
        "send cannot": lambda x: (nt.send(x, NEXT), x)[1],
        "recv cannot": lambda x: nt.recv(x, PREVIOUS),
    }.items():
        with pytest.raises(NotImplementedError, match=name):
            jax.grad(lambda x, function=function: function(x).sum())(x)
    with pytest.raises(NotImplementedError, match="ANY_SOURCE"):
        jax.grad(lambda x: nt.sendrecv(x, x, m.ANY_SOURCE, NEXT).sum())(x)


def test_custom_linear_solve_over_all_ranks() -> None:
    """A periodic, distributed operator: derivatives of its solution, against the dense one's."""
    n = 3

    def operator(x, c):
        left = nt.sendrecv(x[-1:], x[:1], PREVIOUS, NEXT)
        right = nt.sendrecv(x[:1], x[-1:], NEXT, PREVIOUS)
        padded = jnp.concatenate([left, x, right])
        return c * x - padded[:-2] - 0.5 * padded[2:]

    def iterate(matvec, b):
        # Richardson's iteration, which converges since the diagonal dominates.
        return jax.lax.fori_loop(0, 60, lambda _, x: x + (b - matvec(x)) / 5.0, jnp.zeros_like(b))

    def solve(b, c):
        return jax.lax.custom_linear_solve(
            lambda x: operator(x, c), b, iterate, transpose_solve=iterate
        )

    identity = np.eye(SIZE * n)
    dense = 5.0 * identity - np.roll(identity, -1, 1) - 0.5 * np.roll(identity, 1, 1)
    own = slice(RANK * n, RANK * n + n)
    b = np.arange(1.0, SIZE * n + 1)
    x = np.linalg.solve(dense, b)
    mine = jnp.asarray(b[own], jnp.float32)
    np.testing.assert_allclose(jax.jit(solve)(mine, 5.0), x[own], rtol=1e-4)
    # Of the sum of squares over all ranks: A⁻ᵀ 2x, and its product with -∂A/∂c x = -x.
    to_b, to_c = jax.grad(lambda b, c: jnp.sum(solve(b, c) ** 2), argnums=(0, 1))(mine, 5.0)
    adjoint = np.linalg.solve(dense.T, 2 * x)
    np.testing.assert_allclose(to_b, adjoint[own], rtol=1e-4)
    np.testing.assert_allclose(to_c, -adjoint[own] @ x[own], rtol=1e-4)
    tangent = jax.jvp(lambda b: solve(b, 5.0), (mine,), (jnp.ones(n),))[1]
    np.testing.assert_allclose(tangent, np.linalg.solve(dense, np.ones(SIZE * n))[own], rtol=1e-4)
