"""mpi4jax 0.9 itself, without its compiled bridge: its calls are executed by this library."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

from mpi_cuda import notoken as nt
from mpi_cuda._arguments import resolve_comm

# scripts/test unpacks it there.
sys.path.insert(0, str(Path(__file__).parents[3] / "out" / "mpi4jax"))
import mpi4jax

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
X = jnp.arange(6.0).reshape(2, 3) + RANK
ALL = np.stack([np.arange(6.0).reshape(2, 3) + rank for rank in range(SIZE)])


def test_the_bridge_is_ours() -> None:
    bridge = sys.modules["mpi4jax._src.xla_bridge.mpi_xla_bridge_cpu"]
    assert Path(str(bridge.__file__)).parts[-2:] == ("_bridge", "mpi4jax.py")


@pytest.mark.parametrize("jit", [False, True])
def test_every_operation_agrees_with_numpy(jit: bool) -> None:
    def run(function, *args):
        return (jax.jit(function) if jit else function)(*args)

    last = SIZE - 1
    ordered = np.cumsum(ALL, axis=0)
    expected = {
        "allgather": (lambda x: mpi4jax.allgather(x), ALL),
        "allreduce": (lambda x: mpi4jax.allreduce(x, op=MPI.MAX), ALL.max(axis=0)),
        "bcast": (lambda x: mpi4jax.bcast(x, last), ALL[last]),
        "gather": (lambda x: mpi4jax.gather(x, last), ALL if RANK == last else X),
        "reduce": (lambda x: mpi4jax.reduce(x, MPI.SUM, last), ordered[-1] if RANK == last else X),
        "scan": (lambda x: mpi4jax.scan(x, MPI.SUM), ordered[RANK]),
        "sendrecv": (lambda x: mpi4jax.sendrecv(x, x, PREVIOUS, NEXT), ALL[PREVIOUS]),
    }
    for name, (function, result) in expected.items():
        np.testing.assert_allclose(run(function, X), result, err_msg=name)
    rows = jnp.arange(SIZE * 2.0).reshape(SIZE, 2) + 100 * RANK
    exchanged = [np.arange(2.0) + 2 * RANK + 100 * rank for rank in range(SIZE)]
    np.testing.assert_allclose(run(mpi4jax.alltoall, rows), exchanged)
    mine = rows if RANK == 0 else rows[0]
    scattered = run(lambda x: mpi4jax.scatter(x, 0), mine)
    np.testing.assert_allclose(scattered, np.arange(2.0) + 2 * RANK)

    def ring(x):
        mpi4jax.barrier()
        if RANK == 0:
            mpi4jax.send(x, NEXT, tag=5)
            return mpi4jax.recv(x, PREVIOUS)
        received = mpi4jax.recv(x, MPI.ANY_SOURCE, tag=5)
        mpi4jax.send(x, NEXT, tag=5)
        return received

    np.testing.assert_allclose(run(ring, X), ALL[PREVIOUS])


def test_special_ranks_and_status() -> None:
    status = MPI.Status()
    received = mpi4jax.sendrecv(X, X, MPI.ANY_SOURCE, NEXT, sendtag=RANK, status=status)
    np.testing.assert_allclose(received, ALL[PREVIOUS])
    assert (status.Get_source(), status.Get_tag()) == (PREVIOUS, PREVIOUS)
    nobody = MPI.PROC_NULL
    np.testing.assert_array_equal(mpi4jax.sendrecv(X, X, nobody, nobody), np.zeros((2, 3)))


def test_both_libraries_share_one_order() -> None:
    """Messages of equal tags on one communicator, sent and received by both in turn."""
    half = COMM.Split(0)

    @jax.jit
    def program(x):
        if RANK == 0:
            for i in range(6):
                (mpi4jax if i % 2 else nt).send(x + i, 1, comm=half)
        elif RANK == 1:
            return [(nt if i % 3 else mpi4jax).recv(x, 0, comm=half) for i in range(6)]
        return None

    for _ in range(3):
        received = program(X)
        if RANK == 1:
            for i, y in enumerate(received):
                np.testing.assert_allclose(y, ALL[0] + i)
    jax.effects_barrier()
    half.Free()


def test_programs_have_no_handles_and_fast_dispatch() -> None:
    split = COMM.Split(0)
    status = MPI.Status()

    def program(x):
        return mpi4jax.sendrecv(x, x, PREVIOUS, NEXT, comm=split, status=status)

    lowered = jax.jit(program).lower(X)
    attributes = re.search(
        r"@mpi_sendrecv_ffi.*?mhlo.backend_config = \{(.*?)\}", lowered.as_text()
    )
    assert attributes is not None
    values = dict(re.findall(r"(\w+) = (-?\d+) : i64", attributes[1]))
    for name in ("status", "sendtype", "recvtype"):
        assert 0 <= int(values[name]) < 1 << 20, values
    assert int(values["comm"]) == resolve_comm(split).number != MPI._handleof(split)
    assert not lowered.compile()._executable.unsafe_call.ordered_effects
    split.Free()


def test_an_eager_call_compiles_once() -> None:
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for _ in range(3):
        mpi4jax.allreduce(X, op=MPI.SUM).block_until_ready()
    assert len(compiled) <= 1


def test_gradients_are_those_of_mpi4jax() -> None:
    def loss(x):
        return (mpi4jax.allreduce(x, op=MPI.SUM) ** 2).sum()

    np.testing.assert_allclose(jax.grad(loss)(X), 2 * ALL.sum(axis=0))


def test_errors_are_exceptions() -> None:
    with pytest.raises(Exception, match=r"mpi4jax's send of float32.*destination 1000"):
        mpi4jax.send(X, 1000)
        jax.effects_barrier()
    with pytest.raises(TypeError, match="MAXLOC"):
        mpi4jax.allreduce(X, op=MPI.MAXLOC)


def test_user_defined_reductions() -> None:
    def larger(left, right, _):
        a, b = np.frombuffer(left, np.float32), np.frombuffer(right, np.float32)
        np.maximum(a, b, out=b)

    op = MPI.Op.Create(larger, commute=True)
    np.testing.assert_array_equal(mpi4jax.allreduce(X, op=op), ALL.max(axis=0))
    op.Free()


def test_a_handle_of_another_run_is_refused() -> None:
    # Without a side effect, so that only the result has the error.
    call = jax.ffi.ffi_call("mpi_allreduce_ffi", jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(Exception, match=r"0x123456789abc.*JAX_PLATFORMS"):
        jax.jit(lambda x: call(x, comm=np.int64(0x1234_5678_9ABC), op=np.int64(0)))(
            X
        ).block_until_ready()


@pytest.mark.skipif(SIZE < 2, reason="needs several ranks")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("module", [mpi4jax, nt])
def test_a_status_is_filled_when_the_call_returns(module: Any, jit: bool) -> None:
    for i in range(10):
        if RANK == 0:
            status = MPI.Status()

            def receive(x: jax.Array, status: MPI.Status = status) -> jax.Array:
                return module.recv(x, MPI.ANY_SOURCE, tag=MPI.ANY_TAG, status=status)

            (jax.jit(receive) if jit else receive)(jnp.zeros(2))
            assert (status.Get_source(), status.Get_tag()) == (1, i + 1)
        elif RANK == 1:
            module.send(jnp.ones(2), 0, tag=i + 1)
    jax.effects_barrier()


@pytest.mark.skipif(SIZE < 2, reason="needs several ranks")
def test_a_program_without_a_status_is_not_waited_for() -> None:
    """Whatever statuses other programs have: the message is sent after the barrier."""
    if RANK == 1:
        mpi4jax.send(jnp.ones(2), 0, tag=1)
    elif RANK == 0:
        mpi4jax.recv(jnp.zeros(2), 1, tag=1, status=MPI.Status())
    for module in (mpi4jax, nt):
        if RANK == 0:
            later = jax.jit(lambda x, module=module: module.recv(x, 1, tag=7) + 1)(jnp.zeros(3))
        MPI.COMM_WORLD.Barrier()
        if RANK == 1:
            module.send(jnp.ones(3), 0, tag=7)
        elif RANK == 0:
            np.testing.assert_array_equal(later, np.full(3, 2))
