"""Collectives whose ranks' arrays differ in length, against numpy, in both styles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
DTYPES = ["bool", "int8", "int32", "uint16", "float32", "float64", "complex64", "bfloat16"]
FEW_BITS = ["int4", "float8_e5m2"]
# Of some ranks none, of all of them none, of one alone, and many.
COUNTS = {
    "some": tuple((3 * rank + 1) % 4 for rank in range(SIZE)),
    "none": (0,) * SIZE,
    "one": tuple(5 * (rank == SIZE - 1) for rank in range(SIZE)),
    "many": tuple(1000 * rank + 1 for rank in range(SIZE)),
}
ROWS = [(), (2, 0), (2, 3)]


def block(rank: int, rows: int, row: tuple[int, ...] = (3,), dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(rank).integers(0, 7, (rows, *row))
    return values.astype(jnp.dtype(dtype))


def everyone(counts: tuple[int, ...], row: tuple[int, ...] = (3,), dtype: str = "float32") -> Any:
    return np.concatenate([block(r, n, row, dtype) for r, n in enumerate(counts)])


def rows_between(sender: int, receiver: int) -> int:
    return (2 * sender + 3 * receiver) % 4


SEND_COUNTS = [rows_between(RANK, other) for other in range(SIZE)]
RECV_COUNTS = [rows_between(other, RANK) for other in range(SIZE)]


def exchanged(row: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What this rank sends in an alltoallv, and what it receives."""

    def part(sender: int, receiver: int) -> np.ndarray:
        rows = rows_between(sender, receiver)
        return block(100 * sender + receiver, rows, row, dtype)

    ranks = range(SIZE)
    return (
        np.concatenate([part(RANK, other) for other in ranks]),
        np.concatenate([part(other, RANK) for other in ranks]),
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", COUNTS)
def test_every_count_and_row(name: str, row: tuple[int, ...]) -> None:
    counts = COUNTS[name]
    mine, all_rows = block(RANK, counts[RANK], row), everyone(counts, row)
    sent, expected = exchanged(row, "float32")
    roots = [0, SIZE - 1]
    on_roots = [all_rows if RANK == root else np.zeros_like(mine) for root in roots]

    def program(mine: Any, on_roots: list[Any], sent: Any) -> Any:
        gathered = [nt.gatherv(mine, counts, root) for root in roots]
        given = [nt.scatterv(x, counts, root) for x, root in zip(on_roots, roots, strict=True)]
        everywhere = nt.allgatherv(mine, counts)
        return gathered, given, everywhere, nt.alltoallv(sent, SEND_COUNTS, RECV_COUNTS)

    # Outside of a program each operation is a program, to be compiled.
    program = program if row == ROWS[-1] else jax.jit(program)
    gathered, given, everywhere, swapped = program(mine, on_roots, sent)
    for root, got in zip(roots, gathered, strict=True):
        np.testing.assert_array_equal(got, all_rows if RANK == root else mine)
    for got in given:
        np.testing.assert_array_equal(got, mine)
    np.testing.assert_array_equal(everywhere, all_rows)
    np.testing.assert_array_equal(swapped, expected)


@pytest.mark.parametrize("dtype", DTYPES + FEW_BITS)
def test_every_dtype(dtype: str) -> None:
    counts = COUNTS["some"]
    with jax.enable_x64(True):
        mine, all_rows = block(RANK, counts[RANK], (3,), dtype), everyone(counts, (3,), dtype)
        sent, expected = exchanged((2,), dtype)
        on_root = all_rows if RANK == 0 else mine

        @jax.jit
        def program(mine: jax.Array, on_root: jax.Array, sent: jax.Array) -> dict[str, jax.Array]:
            return {
                "allgatherv": nt.allgatherv(mine, counts),
                "gatherv": nt.gatherv(mine, counts, 0),
                "scatterv": nt.scatterv(on_root, counts, 0),
                "alltoallv": nt.alltoallv(sent, SEND_COUNTS, RECV_COUNTS),
            }

        found = program(mine, on_root, sent)
    wanted = dict(allgatherv=all_rows, gatherv=on_root, scatterv=mine, alltoallv=expected)
    assert wanted.keys() == found.keys()
    for name, got in found.items():
        assert got.dtype == jnp.dtype(dtype), name
        np.testing.assert_array_equal(np.asarray(got), wanted[name], err_msg=name)


def test_with_tokens_in_one_program() -> None:
    counts = COUNTS["some"]
    mine, all_rows = block(RANK, counts[RANK]), everyone(counts)
    sent, expected = exchanged((3,), "float32")

    @jax.jit
    def program(x: Any, y: Any) -> Any:
        gathered, token = m.allgatherv(x, counts, token=m.create_token())
        on_root, token = m.gatherv(x, counts, 0, token=token)
        back, token = m.scatterv(on_root, counts, 0, token=token)
        swapped, token = m.alltoallv(y, SEND_COUNTS, RECV_COUNTS, token=token)
        return gathered, back, swapped, token

    for _ in range(3):
        gathered, back, swapped, token = program(mine, sent)
        np.testing.assert_array_equal(gathered, all_rows)
        np.testing.assert_array_equal(back, mine)
        np.testing.assert_array_equal(swapped, expected)
        assert token.shape == () and token.dtype == np.int32


def test_in_loops_and_on_communicators_of_the_user() -> None:
    mpi = pytest.importorskip("mpi4py.MPI")
    half = mpi.COMM_WORLD.Split(RANK % 2, -RANK)
    rank, size = half.Get_rank(), half.Get_size()
    counts = tuple(range(1, size + 1))

    def body(_: Any, x: Any) -> Any:
        start = sum(counts[:rank])
        return nt.allgatherv(x, counts, comm=half)[start : start + counts[rank]] + 1

    x = jnp.full((counts[rank],), rank)
    got = jax.jit(lambda x: jax.lax.fori_loop(0, 4, body, x))(x)
    np.testing.assert_array_equal(got, np.full(counts[rank], rank + 4))
    half.Free()


def test_long_arrays() -> None:
    counts = tuple(200_000 + 50_000 * rank for rank in range(SIZE))
    mine = np.arange(counts[RANK], dtype=np.float32) + RANK
    whole = np.concatenate([np.arange(n, dtype=np.float32) + r for r, n in enumerate(counts)])
    np.testing.assert_array_equal(nt.allgatherv(mine, counts), whole)
    given = whole if RANK == 0 else mine
    np.testing.assert_array_equal(nt.scatterv(given, counts, 0), mine)
    send_counts = (counts[RANK],) * SIZE
    got = nt.alltoallv(np.tile(mine, SIZE), send_counts, counts)
    np.testing.assert_array_equal(got, whole)


def test_a_matrix_that_is_transposed_by_blocks() -> None:
    """Rows of a matrix to columns, which no number of ranks divides: then a numerical reference."""
    n = 3 * SIZE + 1
    rows = np.diff(np.linspace(0, n, SIZE + 1).astype(int))
    first = np.concatenate([[0], np.cumsum(rows)])
    matrix = np.arange(n * n, dtype=np.float32).reshape(n, n)
    mine = matrix[first[RANK] : first[RANK + 1]]
    parts = [mine[:, first[to] : first[to + 1]].reshape(-1) for to in range(SIZE)]
    counts = [int(rows[RANK] * rows[to]) for to in range(SIZE)]
    got = np.asarray(nt.alltoallv(np.concatenate(parts), counts, counts))
    pieces = np.split(got, np.cumsum(counts)[:-1])
    columns = [p.reshape(rows[r], rows[RANK]) for r, p in enumerate(pieces)]
    np.testing.assert_array_equal(np.concatenate(columns), matrix[:, first[RANK] : first[RANK + 1]])


# NumPy's, since JAX would compile programs for each shape.
def random(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def derivatives_of(function: Any, x: jax.Array) -> None:
    """Both derivatives against finite differences of the losses of all ranks, added up."""
    weights = random(jax.eval_shape(function, x).shape, RANK)

    @jax.jit
    def loss(x: jax.Array) -> jax.Array:
        return (weights * function(x) ** 2).sum()

    direction = random(x.shape, 9 + RANK)

    def total(step: float) -> float:
        return float(nt.allreduce(loss(x + step * direction), m.SUM))

    with jax.enable_x64(True):
        numerical = (total(1e-3) - total(-1e-3)) / 2e-3
        gradient = jax.jit(jax.grad(loss))(x)
        reverse = float(nt.allreduce((gradient * direction).sum(), m.SUM))
        forward = float(nt.allreduce(jax.jvp(loss, (x,), (direction,))[1], m.SUM))
    np.testing.assert_allclose(reverse, numerical, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-5)


@pytest.mark.rule
def test_derivatives_against_finite_differences() -> None:
    counts = COUNTS["some"]
    with jax.enable_x64(True):
        mine = random((counts[RANK], 2), RANK)
        on_root = random((sum(counts), 2), 7)
        sent = random((sum(SEND_COUNTS), 2), RANK)
        derivatives_of(lambda x: nt.allgatherv(x, counts), mine)
        derivatives_of(lambda x: nt.gatherv(x, counts, SIZE - 1), mine)
        derivatives_of(lambda x: nt.scatterv(x, counts, 0), on_root if RANK == 0 else mine)
        derivatives_of(lambda x: nt.alltoallv(x, SEND_COUNTS, RECV_COUNTS), sent)


OPERATIONS = {
    "allgatherv": lambda x, counts: nt.allgatherv(x, counts),
    "gatherv": lambda x, counts: nt.gatherv(x, counts, 0),
    "scatterv": lambda x, counts: nt.scatterv(x, counts, SIZE - 1),
    "alltoallv": lambda x, counts: nt.alltoallv(x, counts, counts),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_counts_that_do_not_fit_are_refused_by_name(name: str) -> None:
    function, x = OPERATIONS[name], jnp.ones((2, 3))
    what = "send_counts" if name == "alltoallv" else "counts"
    start = f"{name} on rank {RANK}: {what} "
    with pytest.raises(ValueError, match=rf"{start}.* has {SIZE + 1} numbers, and .* {SIZE} ranks"):
        function(x, (1,) * (SIZE + 1))
    with pytest.raises(ValueError, match=rf"{start}.* a negative number for rank 0, -2"):
        function(x, (-2,) + (1,) * (SIZE - 1))
    with pytest.raises(ValueError, match=rf"{name} on rank {RANK}: x has shape \(2, 3\)"):
        function(x, (3,) * SIZE)
    with pytest.raises(ValueError, match=r"x has shape \(\), and with .* leading dimension"):
        function(jnp.float32(1), (1,) * SIZE)
    with pytest.raises(TypeError, match=f"{name}: each of {what} must be an integer"):
        function(x, (1.5,) * SIZE)
    with pytest.raises(TypeError, match=f"{name}: {what} must be integers, got 2"):
        function(x, 2)
    with pytest.raises(TypeError, match=f"{name}: each of {what} must be a Python integer"):
        jax.jit(function)(x, jnp.ones(SIZE, int))
    with pytest.raises(ValueError, match="more rows than memory can hold"):
        function(x, (2**63,) * SIZE)
    # Whoever refuses has told the others: what comes next meets again.
    np.testing.assert_array_equal(nt.allreduce(jnp.int32(1), m.SUM), SIZE)


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_counts_that_differ_between_ranks_are_an_error_of_all() -> None:
    counts = [2] * SIZE
    if RANK == 0:
        counts[1] = 3
    with pytest.raises(Exception, match=r"allgatherv of .*execute different operations.*\(2, 3"):
        nt.allgatherv(jnp.ones((2, 1)), counts).block_until_ready()
    np.testing.assert_array_equal(nt.allgatherv(jnp.ones(2), [2] * SIZE), np.ones(2 * SIZE))


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("other", [0, 1, 3])
def test_rows_that_nobody_expects_are_an_error_of_all(other: int, jitted: bool) -> None:
    send_counts, recv_counts = [2] * SIZE, [2] * SIZE
    if RANK == 0:
        send_counts[1] = other

    def program(x: jax.Array) -> jax.Array:
        return nt.alltoallv(x, send_counts, recv_counts)

    program = jax.jit(program) if jitted else program
    words = f"rank 0 sends {other} rows to rank 1, which expects 2"
    with pytest.raises(Exception, match=f"alltoallv of .*ranks do not agree: {words}"):
        program(jnp.ones((sum(send_counts), 3))).block_until_ready()
    # Nothing of it is left over.
    sent, expected = exchanged((3,), "float32")
    np.testing.assert_array_equal(nt.alltoallv(sent, SEND_COUNTS, RECV_COUNTS), expected)


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
@pytest.mark.parametrize("on", ["default", "the user's"])
@pytest.mark.parametrize("jitted", [False, True])
def test_rows_of_another_kind_are_an_error_of_all(on: str, jitted: bool) -> None:
    """Rank 0 sends nobody a row, and its rows would be others than those of the others."""
    comm = None if on == "default" else pytest.importorskip("mpi4py.MPI").COMM_WORLD.Dup()
    counts = [0] + [1] * (SIZE - 1)
    send_counts = [0] * SIZE if RANK == 0 else [1] * SIZE
    for other in (jnp.zeros((0, 3), jnp.int32), jnp.zeros((0, 2), jnp.float32)):
        x = other if RANK == 0 else jnp.ones((SIZE, 3), jnp.float32)

        def program(x: jax.Array) -> jax.Array:
            return nt.alltoallv(x, send_counts, counts, comm=comm)

        program = jax.jit(program) if jitted else program
        with pytest.raises(Exception, match=r"alltoallv of .*(different operations|same shape)"):
            program(x).block_until_ready()
        np.testing.assert_array_equal(nt.allreduce(jnp.int32(1), m.SUM), SIZE)


def test_what_a_rank_sends_itself_is_what_it_expects() -> None:
    send_counts, recv_counts = [1] * SIZE, [1] * SIZE
    recv_counts[RANK] = 2
    text = rf"alltoallv on rank {RANK}: it sends 1 rows to itself and expects 2"
    with pytest.raises(ValueError, match=text):
        nt.alltoallv(jnp.ones(SIZE), send_counts, recv_counts)
    np.testing.assert_array_equal(nt.allreduce(jnp.int32(1), m.SUM), SIZE)


def call(target: str, shape: tuple[int, ...], x: jax.Array, **attributes: Any) -> None:
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    # Without a side effect only the result has its error.
    function = jax.ffi.ffi_call(target, result)
    attributes = {"comm": np.int64(2), **attributes}
    jax.block_until_ready(jax.jit(lambda x: function(x, **attributes))(x))


def test_custom_calls_of_anybody_are_checked() -> None:
    """Of `COMM_SELF`, which has one rank."""
    x, counts = jnp.ones((2, 3)), {"counts": np.array([2])}
    call("mpi_cuda_allgatherv", (2, 3), x, **counts)
    refused = [
        ({}, (2, 3), "counts has 0 numbers, \\(\\), and the communicator 1 ranks"),
        ({"counts": np.int64(2)}, (2, 3), "attribute counts is int64 2, and must be an array of i"),
        ({"counts": np.int32([2])}, (2, 3), "is an array of 1 int32, and must be an array of int6"),
        ({"counts": np.array([2, 0])}, (2, 3), "counts has 2 numbers, \\(2, 0\\)"),
        ({"counts": np.array([-1])}, (2, 3), "that of rank 0 is negative: -1"),
        ({"counts": np.array([3])}, (2, 3), "the operand is float32\\[2,3\\], and by counts"),
        (counts, (3, 2), "the result is float32\\[3,2\\], and by counts \\(2,\\) its leading"),
        (counts, (2, 2), "all dimensions behind the first must be the same"),
    ]
    for attributes, shape, text in refused:
        with pytest.raises(Exception, match=f"mpi_cuda.*allgatherv.*{text}"):
            call("mpi_cuda_allgatherv", shape, x, **attributes)
    with pytest.raises(Exception, match="sends 2 rows to itself and expects 1"):
        both = {"send_counts": np.array([2]), "recv_counts": np.array([1])}
        call("mpi_cuda_alltoallv", (1, 3), x, **both)
    with pytest.raises(Exception, match=r"attribute counts .* is not known; its attributes are co"):
        call("mpi_cuda_allgather", (1, 2, 3), x, **counts)
