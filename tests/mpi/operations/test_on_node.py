"""Collectives through memory that the ranks of a node share, against numpy, bit by bit."""

from __future__ import annotations

import hashlib
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
#: Ranks of several nodes and arrays in memory of a device use MPI, which has an order of its own.
SHARED = (
    os.environ.get("MPI_CUDA_SHM_COLLECTIVES") != "0"
    and "MPI_CUDA_PRETEND_NODES" not in os.environ
    and os.environ.get("MPI_CUDA_PRETEND_DEVICE") != "aware"
)
OPERATIONS = {"SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
DTYPES = ["float32", "float64", "int32", "int64", "uint32", "uint64"]
#: What is reduced whole or in slices, in one block or several, and past the caches.
LENGTHS = [1, 2, 7, 33, 1023, 1025, 5000, 32_769, 100_003, 1_100_003]

pytestmark = pytest.mark.skipif(SIZE == 1, reason="needs other ranks")


def data(rank: int, length: int, dtype: str) -> np.ndarray:
    random = np.random.default_rng([rank, length])
    if dtype.startswith("float"):
        return random.normal(size=length).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, length, dtype, endpoint=True)


def in_order(rows: list[np.ndarray], op: str) -> np.ndarray:
    result = rows[0]
    for row in rows[1:]:
        result = OPERATIONS[op](result, row)
    return result


def check(result: jax.Array, rows: list[np.ndarray], op: str) -> None:
    """The result is right, and the same bits on every rank."""
    found, want = np.asarray(result), in_order(rows, op)
    assert found.dtype == want.dtype
    if SHARED or found.dtype.kind != "f":
        np.testing.assert_array_equal(found, want)
    else:
        tolerance = 1e-4 if found.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(found, want, tolerance, tolerance)
    digest = hashlib.sha256(found.tobytes()).digest()
    assert len(set(MPI.COMM_WORLD.allgather(digest))) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_reduction(dtype: str) -> None:
    with jax.enable_x64(True), np.errstate(over="ignore"):
        rows = [[data(rank, length, dtype) for rank in range(SIZE)] for length in [1025, 50_003]]

        @jax.jit
        def all_of_them(mine: list[jax.Array]) -> dict[str, list[jax.Array]]:
            return {op: [nt.allreduce(x, getattr(m, op)) for x in mine] for op in OPERATIONS}

        for op, results in all_of_them([jnp.asarray(row[RANK]) for row in rows]).items():
            for result, row in zip(results, rows, strict=True):
                check(result, row, op)


def test_lengths_of_all_kinds_in_one_program() -> None:
    rows = [[data(rank, length, "float32") for rank in range(SIZE)] for length in LENGTHS]

    @jax.jit
    def all_of_them(mine: list[jax.Array]) -> list[jax.Array]:
        return [nt.allreduce(x, m.SUM) for x in mine]

    # Short and long ones in turn, in both orders.
    for _ in range(3):
        mine = [jnp.asarray(row[RANK]) for row in rows]
        for result, row in zip(all_of_them(mine), rows, strict=True):
            check(result, row, "SUM")
        for result, row in zip(all_of_them(mine[::-1]), rows[::-1], strict=True):
            check(result, row, "SUM")


def test_ranks_that_come_late() -> None:
    """Those that wait go to sleep, and are woken."""
    for late in range(SIZE):
        for length in [5, 50_000]:
            rows = [data(rank, length, "float32") for rank in range(SIZE)]
            if late == RANK:
                time.sleep(0.02)
            check(nt.allreduce(jnp.asarray(rows[RANK]), m.SUM), rows, "SUM")


def test_many_in_a_loop() -> None:
    x = jnp.full(3, RANK + 1.0)

    @jax.jit
    def loop(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 2000, lambda _, y: nt.allreduce(y, m.SUM) / SIZE, x)

    np.testing.assert_allclose(loop(x), np.full(3, (SIZE + 1) / 2), 1e-6)


def test_collectives_of_xlas_and_of_groups() -> None:
    mesh = Mesh(np.array(jax.devices()), "x")
    length = 40_001
    rows = [data(rank, length, "float32") for rank in range(SIZE)]
    x = jax.make_array_from_callback(
        (SIZE, length), NamedSharding(mesh, P("x")), lambda index: np.stack(rows)[index]
    )
    step = jax.jit(
        jax.shard_map(lambda x: lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    )
    check(step(x).addressable_data(0)[0], rows, "SUM")
    if SIZE % 2 == 0:
        halves = Mesh(np.array(jax.devices()).reshape(2, -1), ("a", "b"))
        sharding = NamedSharding(halves, P(("a", "b")))
        y = jax.make_array_from_callback(
            (SIZE, length), sharding, lambda index: np.stack(rows)[index]
        )
        step = jax.jit(
            jax.shard_map(
                lambda y: lax.psum(y, "b"), mesh=halves, in_specs=P(("a", "b")), out_specs=P("a")
            )
        )
        first = RANK // (SIZE // 2) * (SIZE // 2)
        found = np.asarray(step(y).addressable_data(0)[0])
        want = in_order(rows[first : first + SIZE // 2], "SUM")
        np.testing.assert_allclose(found, want, 1e-5, 1e-5)


def test_what_the_user_shares_with_mpi4py_goes_through_mpi() -> None:
    dup = MPI.COMM_WORLD.Dup()
    rows = [data(rank, 1025, "float32") for rank in range(SIZE)]
    found = nt.allreduce(jnp.asarray(rows[RANK]), m.SUM, comm=dup)
    np.testing.assert_allclose(found, in_order(rows, "SUM"), 1e-5, 1e-5)


#: Bytes that one rank gives to one: parts of a block of any number of ranks, and several blocks.
PARTS = [1, 7, 64, 1000, 65_536, 65_540, 87_424, 131_072, 131_088, 262_144, 262_145, 1_500_000]
EXPECTED = {
    "allgather": lambda rows: np.stack(rows),
    "bcast": lambda rows: rows[SIZE - 1],
    "gather": lambda rows: np.stack(rows) if RANK == SIZE - 1 else rows[RANK],
}
DIVIDED = {
    "alltoall": lambda wide: np.stack([row[RANK] for row in wide]),
    "scatter": lambda wide: wide[SIZE - 1][RANK],
}
ROOTED = ["bcast", "gather", "scatter", "reduce"]


def call(operation: str, x: jax.Array, *arguments: m.Op) -> jax.Array:
    """Of the last rank, where there is a root."""
    root = [SIZE - 1] if operation in ROOTED else []
    if operation == "scatter" and RANK != SIZE - 1:
        x = x[0]
    return getattr(nt, operation)(x, *arguments, *root)


def moved_everywhere(rows: list[np.ndarray], wide: list[np.ndarray], jit: bool) -> None:
    """Everything that only moves data, in one program."""

    def all_of_them(row: jax.Array, wide: jax.Array) -> dict[str, jax.Array]:
        results = {operation: call(operation, row) for operation in EXPECTED}
        nt.barrier()
        return results | {operation: call(operation, wide) for operation in DIVIDED}

    found = (jax.jit(all_of_them) if jit else all_of_them)(rows[RANK], wide[RANK])
    for operation, result in found.items():
        want = EXPECTED[operation](rows) if operation in EXPECTED else DIVIDED[operation](wide)
        assert result.dtype == want.dtype, operation
        assert np.asarray(result).tobytes() == want.tobytes(), operation


@pytest.mark.parametrize("length", PARTS)
def test_what_is_moved_has_any_length(length: int) -> None:
    rows = [data(rank, length, "uint8") for rank in range(SIZE)]
    wide = [data(rank, length * SIZE, "uint8").reshape(SIZE, length) for rank in range(SIZE)]
    for _ in range(2):
        moved_everywhere(rows, wide, jit=True)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint16", "bfloat16", "float16", "complex64", "complex128", "float64"]
)
def test_what_is_moved_has_any_dtype(dtype: str) -> None:
    with jax.enable_x64(True):
        kind = jnp.dtype(dtype)

        def array(rank: int, length: int) -> np.ndarray:
            if dtype == "bool":
                return data(rank, length, "uint8") > 99
            return (data(rank, length, "float32") * (1 if rank % 2 else 50)).astype(kind)

        for length in [1, 333, 40_001]:
            rows = [array(rank, length) for rank in range(SIZE)]
            wide = [array(rank, length * SIZE).reshape(SIZE, length) for rank in range(SIZE)]
            # Outside of a program each operation is a program, to be compiled.
            moved_everywhere(rows, wide, jit=length != 333)


def test_nothing_is_moved() -> None:
    rows, wide = [np.zeros((SIZE, *shape), "float32") for shape in [(0,), (SIZE, 0)]]
    moved_everywhere(list(rows), list(wide), jit=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_for_one_rank_and_of_parts(dtype: str) -> None:
    """Every reduction and length in one program."""
    with jax.enable_x64(True), np.errstate(over="ignore"):
        lengths = [1, 1023, 17_001, 131_073]
        rows = {n: [data(rank, n, dtype) for rank in range(SIZE)] for n in lengths}
        wide = {
            n: [data(rank, n * SIZE, dtype).reshape(SIZE, n) for rank in range(SIZE)]
            for n in lengths
        }
        each = [(op, n) for op in OPERATIONS for n in lengths]

        @jax.jit
        def all_of_them(
            mine: dict[int, jax.Array], parts: dict[int, jax.Array]
        ) -> list[tuple[jax.Array, jax.Array]]:
            return [
                (
                    call("reduce", mine[n], getattr(m, op)),
                    call("reduce_scatter", parts[n], getattr(m, op)),
                )
                for op, n in each
            ]

        found = all_of_them(
            {n: jnp.asarray(rows[n][RANK]) for n in lengths},
            {n: jnp.asarray(wide[n][RANK]) for n in lengths},
        )
        for (op, n), (reduced, part) in zip(each, found, strict=True):
            want = in_order(rows[n], op) if RANK == SIZE - 1 else rows[n][RANK]
            # MPI executes a longer reduce, in an order of its own.
            check_part(reduced, want, in_memory=reduced.nbytes <= 65_536)
            check_part(part, in_order(wide[n], op)[RANK], in_memory=True)


def check_part(result: jax.Array, want: np.ndarray, *, in_memory: bool) -> None:
    found = np.asarray(result)
    assert found.dtype == want.dtype
    if (SHARED and in_memory) or found.dtype.kind != "f":
        np.testing.assert_array_equal(found, want)
    else:
        np.testing.assert_allclose(found, want, 1e-4, 1e-4)


def test_a_root_that_runs_ahead_overwrites_nothing() -> None:
    """The others come late to each, and find what was meant for them."""

    @jax.jit
    def some(start: jax.Array) -> list[jax.Array]:
        long = [jnp.full(100_000, start + step, "float32") for step in range(4)]
        short = [jnp.full(3, start - step, "float32") for step in range(12)]
        return [nt.bcast(x, root) for x in short + long + short for root in range(SIZE)]

    for late in range(SIZE):
        if late == RANK:
            time.sleep(0.02)
        found = some(jnp.float32(1000 * (RANK + 1)))
        steps = [*(-step for step in range(12)), *range(4), *(-step for step in range(12))]
        want = [1000 * (root + 1) + step for step in steps for root in range(SIZE)]
        assert [float(x[0]) for x in found] == want
        assert all((x == x[0]).all() for x in found)


def test_gathers_for_ranks_in_turn() -> None:
    """Those that only give run ahead of who takes."""

    @jax.jit
    def loop(x: jax.Array) -> jax.Array:
        def step(number: jax.Array, total: jax.Array) -> jax.Array:
            for root in range(SIZE):
                total = total + nt.gather(x + number, root).sum()
                total = total + nt.reduce(x * number, m.SUM, root)[0]
            return total

        return lax.fori_loop(0, 300, step, jnp.float32(0))

    x = np.full(2, RANK + 1.0, "float32")
    everybody = SIZE * (SIZE + 1) / 2
    want = 0.0
    for number in range(300):
        for root in range(SIZE):
            own = root == RANK
            want += 2 * (everybody + SIZE * number if own else RANK + 1 + number)
            want += number * (everybody if own else RANK + 1)
    np.testing.assert_allclose(loop(jnp.asarray(x)), want, 1e-5)


@pytest.mark.parametrize("length", [SIZE, 720, 100_000 * SIZE])
def test_what_xla_gathers_scatters_and_exchanges(length: int) -> None:
    """Of all ranks, and of half of them."""
    meshes = [(Mesh(np.array(jax.devices()), "x"), range(SIZE))]
    if SIZE % 2 == 0 and SIZE > 2:
        half = SIZE // 2
        members = range(RANK // half * half, RANK // half * half + half)
        meshes.append((Mesh(np.array(jax.devices()).reshape(2, half), ("y", "x")), members))
    rows = [data(rank, length, "float32") for rank in range(SIZE)]
    for mesh, members in meshes:
        spec = P(mesh.axis_names)
        x = jax.make_array_from_callback(
            (SIZE * length,), NamedSharding(mesh, spec), lambda index: np.concatenate(rows)[index]
        )

        def exchange(x: jax.Array) -> list[jax.Array]:
            return [
                lax.all_gather(x, "x", tiled=True),
                lax.psum_scatter(x, "x", tiled=True),
                lax.all_to_all(x, "x", 0, 0, tiled=True),
            ]

        step = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))
        found = [np.asarray(y.addressable_data(0)) for y in step(x)]
        mine = [rows[member] for member in members]
        part = length // len(members)
        place = slice(members.index(RANK) * part, (members.index(RANK) + 1) * part)
        np.testing.assert_array_equal(found[0], np.concatenate(mine))
        np.testing.assert_allclose(found[1], in_order(mine, "SUM")[place], 1e-4, 1e-4)
        np.testing.assert_array_equal(found[2], np.concatenate([row[place] for row in mine]))
