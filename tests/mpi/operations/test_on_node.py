"""Allreduce through memory that the ranks of a node share, against numpy, bit by bit."""

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
