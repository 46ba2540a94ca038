"""Custom calls of the interface before FFI in programs of all ranks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
MESH = Mesh(np.array(jax.devices()), ("x",))
ROWS = NamedSharding(MESH, P("x"))
LENGTH = 4

pytestmark = pytest.mark.not_on_gpu("there XLA's own plugin calls them")

POINTERS = ctypes.POINTER(ctypes.c_void_p)
FLOATS = ctypes.POINTER(ctypes.c_float)
SIGNATURE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, POINTERS, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)


class Status(ctypes.Structure):
    """`XlaCustomCallStatus`: a `std::optional<std::string>` of libstdc++."""

    _fields_ = (
        ("text", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("short", ctypes.c_char * 16),
        ("has_failed", ctypes.c_bool),
    )


def rows_of(pointer: int, rows: int) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(pointer, FLOATS), (rows, LENGTH))


def scan_rows(out: int, operands: Any, text: int, size: int, status: int) -> None:
    """Sums along each row, and as many rows as the text says; refuses what is negative."""
    rows = int(ctypes.string_at(text, size))
    x = rows_of(operands[0], rows)
    rows_of(out, rows)[:] = np.cumsum(x, axis=1)
    if (x < 0).any():
        said = Status.from_address(status)
        said.short = b"negative"
        said.text, said.length = status + Status.short.offset, 8
        said.has_failed = True


scanner = SIGNATURE(scan_rows)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    capsule = jax.ffi.pycapsule(ctypes.cast(scanner, ctypes.c_void_p))
    jax.ffi.register_ffi_target("scan_rows", capsule, platform="cpu", api_version=0)


def scanned(x: Any) -> Any:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    text = str(x.size // LENGTH)
    return jax.ffi.ffi_call(
        "scan_rows", shape, custom_call_api_version=3, legacy_backend_config=text
    )(x)


def values(rows: int = SIZE) -> np.ndarray:
    return np.arange(rows * LENGTH, dtype=np.float32).reshape(rows, LENGTH)


def spread(whole: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
        whole.shape, ROWS, whole.__getitem__, dtype=np.dtype(np.float32)
    )


def local(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_data(0))


def mapped(body: Callable[..., Any]) -> Any:
    return jax.jit(
        jax.shard_map(body, mesh=MESH, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    )


def test_between_operations_of_each_rank() -> None:
    @jax.jit
    def program(x: Any) -> Any:
        x = nt.allreduce(scanned(x), op=m.SUM)
        return nt.allreduce(scanned(x * (1 + RANK)), op=m.SUM)

    x = np.ones((3, LENGTH), np.float32)
    once = SIZE * np.cumsum(x, axis=1)
    want = np.cumsum(once, axis=1) * sum(range(1, SIZE + 1))
    np.testing.assert_array_equal(program(x), want)


def test_between_collectives_of_a_program_of_all_ranks() -> None:
    def body(x: Any) -> Any:
        def step(_: Any, x: Any) -> Any:
            return lax.ppermute(scanned(x) % 7, "x", [(i, (i + 1) % SIZE) for i in range(SIZE)])

        return scanned(x) + lax.psum(lax.fori_loop(0, SIZE, step, x), "x")

    whole = values()
    moved = whole
    for _ in range(SIZE):
        moved = np.cumsum(moved, axis=1) % 7
    want = np.cumsum(whole, axis=1) + moved.sum(axis=0)
    result = mapped(body)(spread(whole))
    np.testing.assert_array_equal(local(result), want[RANK : RANK + 1])


def test_of_arrays_of_all_ranks() -> None:
    """XLA knows nothing of the function, so every rank calls it with the whole array."""
    whole = values()
    result = jax.jit(scanned, out_shardings=ROWS)(spread(whole))
    want = np.cumsum(whole, axis=1)
    np.testing.assert_array_equal(local(result), want[RANK : RANK + 1])


def test_in_a_partition_rule() -> None:
    call = custom_partitioning(scanned)
    rows: list[int] = []

    def infer(mesh: Any, arguments: Any, result: Any) -> NamedSharding:
        return NamedSharding(mesh, P(arguments[0].sharding.spec[0], None))

    def by_rank(x: Any) -> Any:
        rows.append(x.shape[0])
        return scanned(x)

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        own = infer(mesh, arguments, result)
        return mesh, by_rank, own, (own,)

    call.def_partition(
        infer_sharding_from_operands=infer, partition=partition, sharding_rule="i j -> i k"
    )
    whole = values(2 * SIZE)
    result = jax.jit(lambda x: call(x) + scanned(x[:2]).sum())(spread(whole))
    want = np.cumsum(whole, axis=1) + np.cumsum(whole[:2], axis=1).sum()
    assert set(rows) == {2}
    np.testing.assert_array_equal(local(result), want[2 * RANK : 2 * RANK + 2])
    # jaxlib keeps the handler that it was given.
    capsule = jax.ffi.pycapsule(ctypes.cast(scanner, ctypes.c_void_p))
    with pytest.raises(ValueError, match="scan_rows was registered with api_version=0"):
        jax.ffi.register_ffi_target("scan_rows", capsule, platform="cpu", api_version=1)
    jax.ffi.register_ffi_target("scan_rows", capsule, platform="cpu", api_version=0)
    np.testing.assert_array_equal(jax.jit(scanned)(whole), np.cumsum(whole, axis=1))


def test_launches_that_are_deferred_donate_and_fail() -> None:
    """More than XLA keeps in flight, before what they wait for is sent."""
    from mpi4py import MPI

    comm, count = MPI.COMM_WORLD, 40
    receive = jax.jit(lambda x: nt.recv(x, 1, tag=5))
    follows = jax.jit(lambda x, y: scanned(x) % 5 + y, donate_argnums=0)
    x = want = values(2)
    if RANK == 0:
        x = jnp.asarray(x)
        for _ in range(count):
            before, x = x, follows(x, receive(x))
            assert before.is_deleted()
        failed = follows(x - 100, x)
        comm.send("dispatched", 1)
        for i in range(count):
            want = np.cumsum(want, axis=1) % 5 + i
        np.testing.assert_array_equal(x, want)
        with pytest.raises(jax.errors.JaxRuntimeError, match="scan_rows: negative"):
            failed.block_until_ready()
    elif RANK == 1:
        assert comm.recv(source=0) == "dispatched"
        for i in range(count):
            nt.send(np.full_like(want, i), 0, tag=5)
    nt.barrier()


@pytest.mark.parametrize("several", [False, True], ids=["one device", "several devices"])
def test_a_failure_on_every_rank_is_raised(several: bool) -> None:
    program = mapped(scanned) if several else jax.jit(scanned)
    give = spread if several else jnp.asarray
    with pytest.raises(jax.errors.JaxRuntimeError, match="scan_rows: negative"):
        program(give(values() - 1e6)).block_until_ready()
    np.testing.assert_array_equal(local(program(give(values())))[0, -1], local_last(several))


def local_last(several: bool) -> float:
    return np.cumsum(values(), axis=1)[RANK if several else 0, -1]
