"""Counts that do not fit MPI's C `int`, of 1-byte elements, and more than 2 GiB of larger ones.

Run with `scripts/test big`: 2 ranks, about 20 GB of memory; not part of CI.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
# Elements of one message: more than an int holds, and no multiple of anything.
COUNT = (1 << 31) + 12345
# The same in bytes, of float32.
FLOATS = (1 << 29) + 12345


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    gc.collect()


def values(places: Any, rank: int) -> Any:
    """Different at every place within a long period, and on every rank."""
    return (places * 7 + (places >> 16) + 31 * rank) & 0x7F


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make(rank: int, count: int = COUNT, dtype: str = "uint8") -> jax.Array:
    return values(jax.lax.iota(jnp.uint32, count), rank).astype(dtype)


def memory(array: jax.Array) -> np.ndarray:
    """The array's own memory, since two copies of it would not fit."""
    pointer = array.addressable_data(0).unsafe_buffer_pointer()
    flat = (ctypes.c_uint8 * array.nbytes).from_address(pointer)
    return np.frombuffer(flat, array.dtype)


def check(
    got: jax.Array, expected: Callable[[np.ndarray], np.ndarray], first: int = 0, count: int = COUNT
) -> None:
    """Compares elements `first` to `first + count` of the flat result with what numpy computes."""
    assert got.size >= first + count
    flat, piece = memory(got.block_until_ready())[first : first + count], 1 << 24
    for start in range(0, count, piece):
        places = np.arange(start, min(start + piece, count), dtype=np.uint32)
        wanted = expected(places).astype(flat.dtype)
        assert np.array_equal(flat[start : start + piece], wanted), f"after element {start}"


def of(rank: int, first: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda places: values(places + np.uint32(first), rank)


def test_messages() -> None:
    template = jax.ShapeDtypeStruct((COUNT,), jnp.uint8)
    if RANK == 0:
        nt.send(make(0), 1)
        status = m.Status()
        check(nt.recv(template, 1, status=status), of(1))
        assert status.Get_source() == 1
    elif RANK == 1:
        check(nt.recv(template, 0), of(0))
        nt.send(make(1), 0)
    jax.effects_barrier()


def test_a_message_of_another_length_is_an_error() -> None:
    if RANK == 0:
        nt.send(make(0), 1)
        jax.effects_barrier()
    elif RANK == 1:
        with pytest.raises(Exception, match=rf"has {COUNT} bytes, and the result {COUNT - 1}"):
            nt.recv(jax.ShapeDtypeStruct((COUNT - 1,), jnp.uint8), 0).block_until_ready()
    nt.barrier()


def test_exchange() -> None:
    left, right = (RANK - 1) % SIZE, (RANK + 1) % SIZE
    check(nt.sendrecv(make(RANK), jax.ShapeDtypeStruct((COUNT,), jnp.uint8), left, right), of(left))


def test_bcast() -> None:
    check(nt.bcast(make(RANK), 1), of(1))


@pytest.mark.parametrize(("count", "dtype"), [(COUNT, "uint8"), (FLOATS, "float32")])
def test_allreduce(count: int, dtype: str) -> None:
    got = nt.allreduce(make(RANK, count, dtype), m.MAX)
    check(got, lambda places: np.maximum(of(0)(places), of(1)(places)), count=count)


def both(places: np.ndarray) -> np.ndarray:
    return of(0)(places) + of(1)(places)


def test_reduce() -> None:
    check(nt.reduce(make(RANK), m.SUM, 0), both if RANK == 0 else of(RANK))


def test_scan() -> None:
    check(nt.scan(make(RANK), m.SUM), both if RANK else of(0))


def test_exscan() -> None:
    check(nt.exscan(make(RANK), m.SUM), of(0) if RANK else np.zeros_like)


def test_allgather() -> None:
    got = nt.allgather(make(RANK))
    for rank in range(SIZE):
        check(got, of(rank), rank * COUNT)


def test_gather() -> None:
    got = nt.gather(make(RANK), 1)
    for rank in range(SIZE if RANK == 1 else 0):
        check(got, of(rank), rank * COUNT)


# What every rank passes here is as large as COUNT: half of it for each rank.
BLOCK = (1 << 30) + 4321


def blocks(rank: int) -> jax.Array:
    return make(rank, SIZE * BLOCK).reshape(SIZE, BLOCK)


def test_scatter() -> None:
    x = blocks(0) if RANK == 0 else make(RANK, BLOCK)
    check(nt.scatter(x, 0), of(0, RANK * BLOCK), count=BLOCK)


def test_alltoall() -> None:
    got = nt.alltoall(blocks(RANK))
    for rank in range(SIZE):
        check(got, of(rank, RANK * BLOCK), rank * BLOCK, BLOCK)


def test_reduce_scatter() -> None:
    got = nt.reduce_scatter(blocks(RANK), m.SUM)
    check(got, lambda places: both(places + np.uint32(RANK * BLOCK)), count=BLOCK)


def test_alltoall_of_float32_beyond_two_gigabytes() -> None:
    half = FLOATS // 2
    got = nt.alltoall(make(RANK, SIZE * half, "float32").reshape(SIZE, half))
    for rank in range(SIZE):
        check(got, of(rank, RANK * half), rank * half, half)


# Rows of each rank where blocks differ in length: more than an int holds of rank 0, and few of the
# others.
ROWS = (COUNT, *(5 + rank for rank in range(1, SIZE)))
FIRST_ROWS = [sum(ROWS[:rank]) for rank in range(SIZE)]


def check_rows(got: jax.Array) -> None:
    assert got.shape == (sum(ROWS),)
    for rank, count in enumerate(ROWS):
        check(got, of(rank), FIRST_ROWS[rank], count)


def test_allgatherv() -> None:
    check_rows(nt.allgatherv(make(RANK, ROWS[RANK]), ROWS))


def test_gatherv() -> None:
    got = nt.gatherv(make(RANK, ROWS[RANK]), ROWS, 1)
    if RANK == 1:
        check_rows(got)


def test_scatterv() -> None:
    x = make(1, sum(ROWS)) if RANK == 1 else make(RANK, ROWS[RANK])
    check(nt.scatterv(x, ROWS, 1), of(1, FIRST_ROWS[RANK]), count=ROWS[RANK])


def test_alltoallv_between_ranks() -> None:
    """Rank 0 sends its long block to rank 1, all others send a few rows to everybody."""
    sent = [
        [COUNT if (source, to) == (0, 1) else 3 + to for to in range(SIZE)]
        for source in range(SIZE)
    ]
    check_exchange(sent)


def test_alltoallv_with_itself() -> None:
    """Rank 1 keeps its long block, behind short ones for the ranks before."""
    check_exchange([[COUNT if s == to == 1 else 7 for to in range(SIZE)] for s in range(SIZE)])


def check_exchange(sent: list[list[int]]) -> None:
    received = [sent[source][RANK] for source in range(SIZE)]
    got = nt.alltoallv(make(RANK, sum(sent[RANK])), sent[RANK], received)
    assert got.shape == (sum(received),)
    for source, count in enumerate(received):
        check(got, of(source, sum(sent[source][:RANK])), sum(received[:source]), count)


def test_allgatherv_of_float32_beyond_two_gigabytes() -> None:
    """No count is more than an int holds, and bytes are."""
    counts = (FLOATS, *[9] * (SIZE - 1))
    got = nt.allgatherv(make(RANK, counts[RANK], "float32"), counts)
    for rank, count in enumerate(counts):
        check(got, of(rank), sum(counts[:rank]), count)
