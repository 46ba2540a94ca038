"""The operations against numpy, in both styles."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

X = jnp.arange(3.0)
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
DTYPES = ["bool", "int8", "uint16", "int32", "float32", "complex64", "float16", "bfloat16"]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FLOAT8 = [name for name in dir(jnp) if name.startswith("float8_")]


def data(rank: int, shape: tuple[int, ...] = (3, 2), dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(rank).integers(0, 5, shape)
    return values.astype(jnp.dtype(dtype)) + (
        np.asarray(1j * rank).astype(dtype) if dtype == "complex64" else 0
    )


def everyone(dtype: str = "float32") -> np.ndarray:
    return np.stack([data(rank, dtype=dtype) for rank in range(SIZE)])


@pytest.mark.parametrize("dtype", DTYPES + FLOAT8)
def test_movement_of_every_dtype(dtype: str) -> None:
    if dtype in FLOAT8:
        bits = np.random.default_rng(0).integers(0, 256, (SIZE, 3, 2), np.uint8)
        everything = bits.view(jnp.dtype(dtype))
        mine, moved = everything[RANK], nt.allgather(everything[RANK])
        assert moved.dtype == everything.dtype
        np.testing.assert_array_equal(np.asarray(moved).view(np.uint8), bits)
        with pytest.raises(Exception, match=f"there is no SUM of {dtype}"):
            nt.allreduce(mine, m.SUM).block_until_ready()
        return
    kind = jnp.dtype(dtype)
    mine, everything = data(RANK, dtype=dtype).astype(kind), everyone(dtype).astype(kind)
    np.testing.assert_array_equal(nt.allgather(mine), everything)
    np.testing.assert_array_equal(nt.bcast(mine, SIZE - 1), everything[SIZE - 1])
    expected = everything if RANK == 0 else mine
    np.testing.assert_array_equal(nt.gather(mine, 0), expected)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("SUM", lambda x: x.sum(0)),
        ("PROD", lambda x: x.prod(0)),
        ("MIN", lambda x: x.min(0)),
        ("MAX", lambda x: x.max(0)),
        ("LAND", lambda x: np.logical_and.reduce(x).astype(x.dtype)),
        ("LOR", lambda x: np.logical_or.reduce(x).astype(x.dtype)),
        ("LXOR", lambda x: np.logical_xor.reduce(x).astype(x.dtype)),
        ("BAND", np.bitwise_and.reduce),
        ("BOR", np.bitwise_or.reduce),
        ("BXOR", np.bitwise_xor.reduce),
    ],
)
def test_every_reduction(op: str, expected) -> None:
    mine, everything = data(RANK, dtype="int32"), everyone("int32")
    if op in ("LAND", "LOR", "LXOR"):
        # A single operand comes back as it is, so that only truth values agree with numpy.
        mine, everything = mine % 2, everything % 2
    reduction = getattr(m, op)
    np.testing.assert_array_equal(nt.allreduce(mine, reduction), expected(everything))
    np.testing.assert_array_equal(nt.scan(mine, reduction), expected(everything[: RANK + 1]))
    root = SIZE - 1
    result = nt.reduce(mine, reduction, root)
    np.testing.assert_array_equal(result, expected(everything) if RANK == root else mine)
    before = nt.exscan(mine, reduction)
    if RANK:
        np.testing.assert_array_equal(before, expected(everything[:RANK]))
    blocks = np.stack([mine + rank * (op not in ("LAND", "LOR", "LXOR")) for rank in range(SIZE)])
    every_block = everything + (blocks - mine)[RANK]
    np.testing.assert_array_equal(nt.reduce_scatter(blocks, reduction), expected(every_block))


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "float4_e2m1fn"])
def test_types_of_less_than_8_bits_are_moved(dtype: str) -> None:
    kind = jnp.dtype(dtype)
    high = 1 if dtype == "int2" else 3
    everything = np.random.default_rng(3).integers(0, high + 1, (SIZE, 3)).astype(kind)
    mine, right, left = everything[RANK], (RANK + 1) % SIZE, (RANK - 1) % SIZE
    jitted = jax.jit(lambda x: nt.sendrecv(x, x, left, right))
    for got, expected in (
        (nt.allgather(mine), everything),
        (nt.bcast(mine, SIZE - 1), everything[SIZE - 1]),
        (jitted(mine), everything[left]),
    ):
        assert got.dtype == kind
        np.testing.assert_array_equal(np.asarray(got).astype(float), expected.astype(float))
    with pytest.raises(TypeError, match=f"no reduction of {dtype}"):
        nt.allreduce(jnp.asarray(mine), m.SUM)


def test_reductions_of_the_user() -> None:
    from mpi4py import MPI

    calls = []

    def farther(left, right, datatype) -> None:
        """The number that is farther from 0; a wrong order of ranks would be seen in its sign."""
        calls.append(datatype.Get_size())
        a, b = (np.frombuffer(buffer, np.float32) for buffer in (left, right))
        b[:] = np.where(np.abs(a) >= np.abs(b), a, b)

    op = MPI.Op.Create(farther, commute=False)
    everything = np.random.default_rng(4).normal(size=(SIZE, 5)).astype(np.float32)
    everything[:, 0] = 3.0 * (-1.0) ** np.arange(SIZE)
    expected = functools.reduce(lambda a, b: np.where(np.abs(a) >= np.abs(b), a, b), everything)
    program = jax.jit(lambda x: (nt.allreduce(x, op), m.scan(x, op)[0]))
    for _ in range(2):
        result, scanned = program(everything[RANK])
        np.testing.assert_array_equal(result, expected)
        if RANK == SIZE - 1:
            np.testing.assert_array_equal(scanned, expected)
    with pytest.raises(NotImplementedError, match="a user-defined reduction is not linear"):
        jax.grad(lambda x: nt.allreduce(x, op).sum())(everything[RANK])
    with pytest.raises(Exception, match="there is no user-defined reduction of bfloat16"):
        nt.allreduce(jnp.ones(3, jnp.bfloat16), op).block_until_ready()
    assert SIZE == 1 or calls
    op.Free()
    with pytest.raises(ValueError, match="freed"):
        nt.allreduce(X, op)


IDENTITIES = {
    "SUM": lambda kind: 0,
    "PROD": lambda kind: 1,
    "MIN": lambda kind: np.inf if kind.kind == "f" else np.iinfo(kind).max,
    "MAX": lambda kind: -np.inf if kind.kind == "f" else np.iinfo(kind).min,
    "LAND": lambda kind: 1,
    "BAND": lambda kind: kind.type(0) - kind.type(1) if kind.kind == "i" else np.iinfo(kind).max,
    "BXOR": lambda kind: 0,
}


@pytest.mark.parametrize("op", IDENTITIES)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_exscan_on_rank_0_is_the_identity(op: str, dtype: str) -> None:
    kind = np.dtype(dtype)
    if kind.kind == "f" and op in ("LAND", "BAND", "BXOR"):
        return
    result = nt.exscan(np.full((2, 3), 7, kind), getattr(m, op))
    if RANK == 0:
        np.testing.assert_array_equal(result, np.full((2, 3), IDENTITIES[op](kind), kind))


def test_reduce_scatter_needs_a_block_for_every_rank() -> None:
    with pytest.raises(ValueError, match="number of ranks"):
        nt.reduce_scatter(jnp.ones((SIZE + 1, 2)), m.SUM)
    np.testing.assert_array_equal(nt.reduce_scatter(jnp.ones(SIZE), m.SUM), float(SIZE))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_after_every_step(dtype: str) -> None:
    kind, size = jnp.dtype(dtype), 1500
    everything = np.random.default_rng(1).normal(size=(SIZE, size)).astype(kind)
    mine = everything[RANK]
    for op, combine in (("SUM", np.add), ("PROD", np.multiply)):
        expected = everything[0]
        for row in everything[1:]:
            expected = combine(expected.astype(np.float32), row.astype(np.float32)).astype(kind)
        result = nt.allreduce(mine, getattr(m, op))
        assert result.dtype == kind
        # MPI may choose another order of the ranks.
        tolerance = 4 * float(jnp.finfo(kind).eps) if SIZE > 2 else 0
        np.testing.assert_allclose(
            result.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance
        )
        if SIZE == 2:
            scanned = nt.scan(mine, getattr(m, op))
            np.testing.assert_array_equal(scanned, expected if RANK else mine)
    np.testing.assert_array_equal(nt.allreduce(mine, m.MAX), everything.max(0))
    np.testing.assert_array_equal(nt.allreduce(mine, m.MIN), everything.min(0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_not_a_number_is_passed_on(dtype: str) -> None:
    x = np.full(SIZE + 1, 1.0 + RANK)
    x[RANK] = np.nan
    for op in (m.MIN, m.MAX):
        result = nt.allreduce(x.astype(jnp.dtype(dtype)), op).astype(np.float32)
        np.testing.assert_array_equal(np.isnan(result), [True] * SIZE + [False])
        assert result[SIZE] == (1 if op is m.MIN else SIZE)


def test_reductions_of_bool_are_those_of_numpy() -> None:
    everything = np.random.default_rng(2).integers(0, 2, (SIZE, 40)).astype(bool)
    mine = everything[RANK]
    for op, combine in {
        "SUM": np.add,
        "PROD": np.multiply,
        "MIN": np.minimum,
        "MAX": np.maximum,
        "LAND": np.logical_and,
        "LOR": np.logical_or,
        "LXOR": np.logical_xor,
        "BAND": np.bitwise_and,
        "BOR": np.bitwise_or,
        "BXOR": np.bitwise_xor,
    }.items():
        result = nt.allreduce(mine, getattr(m, op))
        np.testing.assert_array_equal(result, functools.reduce(combine, everything), err_msg=op)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_extreme_integers(dtype: str) -> None:
    """MPICH 4.0 itself compares unsigned integers as signed ones."""
    limits = np.iinfo(dtype)
    values = np.array([limits.min, limits.min + 1, 0, 1, limits.max // 2 + 1, limits.max], dtype)
    everything = np.stack([np.roll(values, rank) for rank in range(SIZE)])
    mine = everything[RANK]
    np.testing.assert_array_equal(nt.allreduce(mine, m.MAX), everything.max(0))
    np.testing.assert_array_equal(nt.allreduce(mine, m.MIN), everything.min(0))
    np.testing.assert_array_equal(nt.scan(mine, m.MAX), everything[: RANK + 1].max(0))
    np.testing.assert_array_equal(nt.allreduce(mine, m.SUM), everything.sum(0, dtype))
    np.testing.assert_array_equal(nt.allreduce(mine, m.PROD), everything.prod(0, dtype))
    np.testing.assert_array_equal(nt.allreduce(mine, m.BXOR), np.bitwise_xor.reduce(everything))


def test_alltoall_and_scatter() -> None:
    mine = np.arange(SIZE * 2).reshape(SIZE, 2) + 100 * RANK
    expected = np.stack([np.arange(SIZE * 2).reshape(SIZE, 2)[RANK] + 100 * r for r in range(SIZE)])
    np.testing.assert_array_equal(nt.alltoall(mine), expected)
    root = SIZE - 1
    result = nt.scatter(mine if RANK == root else mine[0], root)
    np.testing.assert_array_equal(result, np.arange(SIZE * 2).reshape(SIZE, 2)[RANK] + 100 * root)


def test_messages_round_a_ring() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    result, token = m.sendrecv(data(RANK), data(RANK), source=left, dest=right)
    np.testing.assert_array_equal(result, data(left))
    if RANK == 0:
        token = m.send(data(RANK), right, tag=5, token=token)
        result, token = m.recv(jax.ShapeDtypeStruct((3, 2), np.float32), left, tag=5, token=token)
    else:
        result, token = m.recv(data(RANK), left, tag=5, token=token)
        token = m.send(data(RANK), right, tag=5, token=token)
    np.testing.assert_array_equal(result, data(left))
    assert token.shape == () and token.dtype == np.int32


@pytest.mark.parametrize("length", [3, 50_000])
def test_what_sendrecv_receives_may_depend_on_what_it_sends(length: int) -> None:
    """Once around: rank 0 receives nothing before its own message has passed all others."""
    x = jnp.arange(length) * 1.5
    left, right = (RANK - 1) % SIZE, (RANK + 1) % SIZE
    for _ in range(3):
        if RANK == 0:
            got = nt.sendrecv(x, x, source=left, dest=right)
        else:
            got = nt.recv(x, left)
            nt.send(got, right)
        np.testing.assert_array_equal(got, x)


def test_long_messages_on_other_communicators() -> None:
    from mpi4py import MPI

    for comm in (MPI.COMM_WORLD.Split(0, -RANK), MPI.COMM_WORLD.Split(RANK // 2, -RANK)):
        rank, size = comm.rank, comm.size
        ranks = comm.allgather(RANK)
        left, right = (rank - 1) % size, (rank + 1) % size
        for length in (1024, 1025, 50_003):
            x = jnp.arange(length) + 1.5 * RANK
            got = nt.sendrecv(x, x, source=left, dest=right, comm=comm)
            np.testing.assert_array_equal(got, np.arange(length) + 1.5 * ranks[left])


def test_sendrecv_of_different_shapes_and_dtypes() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    shapes = [jnp.full((r + 1,), r, jnp.int32 if r % 2 else jnp.float32) for r in range(SIZE)]
    result = nt.sendrecv(shapes[RANK], jnp.zeros_like(shapes[left]), left, right)
    np.testing.assert_array_equal(result, shapes[left])


def test_sendrecv_replace() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    status, x = m.Status(), jnp.arange(5) + 10 * RANK
    result = nt.sendrecv_replace(x, left, right, sendtag=RANK, recvtag=left, status=status)
    np.testing.assert_array_equal(result, np.arange(5) + 10 * left)
    assert (status.Get_source(), status.Get_tag()) == (left, left)
    np.testing.assert_array_equal(x, np.arange(5) + 10 * RANK)
    to = RANK + 1 if RANK + 1 < SIZE else m.PROC_NULL
    shifted, _ = jax.jit(lambda x: m.sendrecv_replace(x, RANK - 1 if RANK else m.PROC_NULL, to))(x)
    np.testing.assert_array_equal(shifted, np.arange(5) + 10 * left if RANK else np.zeros(5))
    with pytest.raises(ValueError, match=f"sendrecv_replace on rank {RANK}: dest {SIZE} is not"):
        nt.sendrecv_replace(x, left, SIZE)
    with pytest.raises(ValueError, match="sendrecv_replace: tag -1 is negative"):
        nt.sendrecv_replace(x, left, right, sendtag=-1)


def test_any_source_any_tag_and_status() -> None:
    if RANK == 0:
        seen = set()
        for _ in range(SIZE - 1):
            status = m.Status()
            value = nt.recv(jnp.zeros(()), status=status)
            value.block_until_ready()
            assert status.Get_tag() == 10 + status.Get_source()
            assert float(value) == status.Get_source()
            seen.add(status.Get_source())
        assert seen == set(range(1, SIZE))
    else:
        nt.send(jnp.float32(RANK), 0, tag=10 + RANK)
    # Another rank's next message would be anybody's too.
    nt.barrier()


def test_status_of_a_long_message() -> None:
    """On a device it comes in several parts."""
    from mpi4py import MPI

    status = MPI.Status()
    if RANK == 1:
        nt.send(jnp.arange(5000.0), 0, tag=6)
    elif RANK == 0:
        got = nt.recv(jnp.zeros(6000), m.ANY_SOURCE, status=status)
        assert (status.Get_source(), status.Get_tag()) == (1, 6)
        assert status.Get_count(MPI.FLOAT) == 5000
        np.testing.assert_array_equal(got, [*range(5000), *[0] * 1000])
    nt.recv(X, m.PROC_NULL, status=status)
    assert status.Get_source() == MPI.PROC_NULL and status.Get_count(MPI.FLOAT) == 0
    nt.barrier()


def test_proc_null_gives_zeros_at_once() -> None:
    received = nt.recv(jnp.full((3,), 7.0), m.PROC_NULL)
    np.testing.assert_array_equal(received, np.zeros(3))
    nt.send(jnp.ones(3), m.PROC_NULL)


def test_0d_and_empty_arrays() -> None:
    assert float(nt.allreduce(1.0, m.SUM)) == SIZE
    assert nt.allgather(jnp.zeros((0, 3))).shape == (SIZE, 0, 3)
    assert nt.allreduce(jnp.zeros((0,)), m.SUM).shape == (0,)
    assert nt.sendrecv(jnp.zeros((0,)), jnp.zeros((0,)), RANK, RANK).shape == (0,)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)])
def test_every_operation_of_0d_and_empty_arrays(shape: tuple[int, ...]) -> None:
    mine, right, left = np.full(shape, RANK, np.float32), (RANK + 1) % SIZE, (RANK - 1) % SIZE
    everything = np.stack([np.full(shape, rank, np.float32) for rank in range(SIZE)])
    total = everything.sum(0)
    expected = [
        (nt.allgather(mine), everything),
        (nt.allreduce(mine, m.SUM), total),
        (nt.alltoall(everything + RANK), everything + RANK),
        (nt.bcast(mine, 1), everything[1]),
        (nt.exscan(mine, m.SUM), everything[:RANK].sum(0)),
        (nt.gather(mine, 0), everything if RANK == 0 else mine),
        (nt.reduce(mine, m.MAX, 0), everything[SIZE - 1] if RANK == 0 else mine),
        (nt.reduce_scatter(everything, m.SUM), mine * SIZE),
        (nt.scan(mine, m.SUM), everything[: RANK + 1].sum(0)),
        (nt.scatter(everything if RANK == 0 else mine, 0), mine),
        (nt.sendrecv(mine, mine, left, right), everything[left]),
    ]
    for number, (got, wanted) in enumerate(expected):
        assert got.shape == wanted.shape, number
        np.testing.assert_array_equal(got, wanted, err_msg=str(number))


def test_eager_calls_compile_once() -> None:
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    rows = jnp.ones((SIZE, 2))
    calls = {
        "allgather": lambda: nt.allgather(rows),
        "allreduce": lambda: m.allreduce(rows, m.SUM)[0],
        "alltoall": lambda: nt.alltoall(rows, comm=m.COMM_WORLD),
        "bcast": lambda: m.bcast(rows, 0)[0],
        "scan": lambda: nt.scan(rows, m.MAX),
        "sendrecv": lambda: nt.sendrecv(rows, rows, (RANK - 1) % SIZE, (RANK + 1) % SIZE),
    }
    for call in calls.values():
        call().block_until_ready()
    before = len(compiled)
    assert before > 0
    for call in calls.values():
        for _ in range(3):
            call().block_until_ready()
    assert len(compiled) == before


def test_operands_keep_their_values() -> None:
    x = jnp.arange(4.0)
    for _ in range(3):
        nt.allreduce(x, m.SUM)
        nt.recv(x, m.PROC_NULL)
    np.testing.assert_array_equal(x, np.arange(4.0))


@pytest.mark.skipif(
    "[madvise]" not in HUGE_PAGES.read_text() if HUGE_PAGES.exists() else True,
    reason="Linux has huge pages always or never here",
)
@pytest.mark.skipif("MPI_CUDA_PART_BYTES" in os.environ, reason="it would be 300,000 parts")
@pytest.mark.not_on_gpu("it is about memory of the host")
def test_messages_lie_in_huge_pages() -> None:
    """Asked for; whether there are free ones is for Linux to say."""

    def asked_for(x: jax.Array) -> bool:
        if "MPI_CUDA_PRETEND_DEVICE" in os.environ:
            return True
        address = x.unsafe_buffer_pointer() + x.nbytes // 2
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= address < int(match[2], 16)
            elif inside and line.startswith("VmFlags"):
                return "hg" in line.split()
        raise AssertionError(f"{address:x} is not mapped")

    x = jnp.arange(float(5 << 20))
    y = nt.allreduce(x, m.SUM).block_until_ready()
    np.testing.assert_array_equal(y, SIZE * x)
    assert asked_for(x) and asked_for(y)


@pytest.mark.rule
def test_gradient_of_allreduce() -> None:
    x = jnp.arange(3.0) + RANK

    def loss(x):
        return (nt.allreduce(x * x, m.SUM)).sum()

    np.testing.assert_allclose(jax.grad(loss)(x), 2 * x)
    _primal, tangent = jax.jvp(lambda x: nt.allreduce(x, m.SUM), (x,), (jnp.ones(3),))
    np.testing.assert_allclose(tangent, np.full(3, SIZE))
    transposed = jax.linear_transpose(lambda x: nt.allreduce(x, m.SUM), x)
    np.testing.assert_allclose(transposed(x)[0], x)
    twice = jax.linear_transpose(lambda y: transposed(y)[0], x)
    np.testing.assert_allclose(twice(x)[0], nt.allreduce(x, m.SUM))


@pytest.mark.rule
def test_second_derivatives_under_vmap() -> None:
    def inner(x):
        return (nt.allreduce(x, m.SUM) ** 2).sum()

    def outer(batch):
        return jax.vmap(jax.grad(inner))(batch).sum()

    batch = jnp.arange(6.0).reshape(2, 3)
    # The gradient is identity(2 sum(x)); the transpose of that identity is the sum again.
    np.testing.assert_allclose(jax.grad(outer)(batch), np.full((2, 3), 2.0 * SIZE))


@pytest.mark.rule
def test_gradient_of_sendrecv_sends_the_other_way() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE

    def loss(x):
        y = nt.sendrecv(x, x, left, right, sendtag=3, recvtag=3)
        return (y * (RANK + 1)).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), np.full(3, right + 1.0))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.ones(3)), np.full(3, right + 1.0))
    _, tangent = jax.jvp(loss, (jnp.ones(3),), (jnp.full(3, RANK + 1.0),))
    assert float(tangent) == 3 * (left + 1) * (RANK + 1)


def test_other_reductions_refuse_differentiation_by_name() -> None:
    with pytest.raises(NotImplementedError, match="only with SUM"):
        jax.grad(lambda x: nt.allreduce(x, m.MAX))(1.0)


@pytest.mark.rule
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(axis: int) -> None:
    batch = np.stack([data(RANK) + i for i in range(4)], axis)

    def one_by_one(function) -> np.ndarray:
        return np.stack([np.asarray(function(data(RANK) + i)) for i in range(4)])

    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for function in [
        lambda x: nt.allreduce(x, m.SUM),
        lambda x: nt.scan(x, m.MAX),
        lambda x: nt.allgather(x),
        lambda x: nt.bcast(x, 0),
        lambda x: nt.gather(x, 0),
        lambda x: nt.sendrecv(x, x, left, right),
        lambda x: nt.alltoall(jnp.stack([x * r for r in range(SIZE)])),
        lambda x: nt.scatter(jnp.stack([x * r for r in range(SIZE)]) if RANK == 0 else x, 0),
    ]:
        result = jax.jit(jax.vmap(function, in_axes=axis))(batch)
        np.testing.assert_array_equal(result, one_by_one(function))


def test_operations_on_the_device_of_another_rank_are_refused() -> None:
    other = jax.devices()[(RANK + 1) % SIZE]
    with pytest.raises(Exception, match=r"device of another rank.*local_devices"):
        jax.jit(lambda: nt.allreduce(jnp.ones(3), m.SUM), device=other)()
