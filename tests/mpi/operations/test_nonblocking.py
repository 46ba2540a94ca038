"""isend, irecv and wait: which message goes where, in every place of a program."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
X = jnp.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("count", [3, 1 << 20])
def test_a_ring_in_both_styles(count: int) -> None:
    x = jnp.arange(count, dtype=jnp.float32)

    @jax.jit
    def without(x):
        coming = nt.irecv(x, PREVIOUS, tag=1)
        going = nt.isend(x + RANK, NEXT, tag=1)
        busy = jnp.sin(x).sum()
        y = nt.wait(coming)
        assert nt.wait(going) is None
        return y, busy

    @jax.jit
    def with_tokens(x, token):
        coming, token = m.irecv(jax.ShapeDtypeStruct(x.shape, x.dtype), PREVIOUS, token=token)
        going, token = m.isend(x + RANK, NEXT, token=token)
        y, token = m.wait(coming, token=token)
        nothing, token = m.wait(going, token=token)
        assert nothing is None
        return y, token

    np.testing.assert_array_equal(without(x)[0], x + PREVIOUS)
    np.testing.assert_array_equal(with_tokens(x, m.create_token())[0], x + PREVIOUS)
    coming = nt.irecv(x, PREVIOUS)
    nt.wait(nt.isend(x * RANK, NEXT))
    np.testing.assert_array_equal(nt.wait(coming), x * PREVIOUS)


def test_messages_are_matched_in_the_order_in_which_receives_started() -> None:
    """Blocking receives and exchanges come behind those started before, as MPI has it."""
    if RANK == 0:
        for i in range(5):
            nt.send(X + i, 1, tag=7)
        nt.send(X + 10, 1, tag=8)
    elif RANK == 1:
        first = nt.irecv(X, 0, tag=7)
        second = nt.irecv(X, m.ANY_SOURCE)
        # Goes past those two, which do not accept it; `second` would accept tag 8 too.
        third = nt.recv(X, 0, tag=7)
        fourth = nt.irecv(X, 0, tag=7)
        fifth = nt.sendrecv(X, X, 0, m.PROC_NULL, recvtag=m.ANY_TAG)
        last = nt.recv(X, m.ANY_SOURCE)
        for i, got in ((1, nt.wait(second)), (0, nt.wait(first)), (2, third), (4, fifth)):
            np.testing.assert_array_equal(got, X + i)
        np.testing.assert_array_equal(nt.wait(fourth), X + 3)
        np.testing.assert_array_equal(last, X + 10)
    jax.effects_barrier()


def test_a_receive_that_nobody_answers_does_not_keep_others_waiting() -> None:
    if RANK == 0:
        never = nt.irecv(X, 1, tag=100)
        np.testing.assert_array_equal(nt.recv(X, 1, tag=5), X * 2)
        nt.send(X, 1, tag=6)
        np.testing.assert_array_equal(nt.wait(never), X * 3)
    elif RANK == 1:
        nt.send(X * 2, 0, tag=5)
        np.testing.assert_array_equal(nt.recv(X, 0, tag=6), X)
        nt.send(X * 3, 0, tag=100)
    jax.effects_barrier()


def test_requests_go_where_arrays_can() -> None:
    """Returned from jit, carried by loops, given back by both branches; a pipeline of messages."""
    steps = 5

    @jax.jit
    def pipeline(x):
        def body(carry, i):
            coming, x = carry
            going = nt.isend(x, NEXT, tag=3)
            y = nt.wait(coming)
            nt.wait(going)
            coming = nt.irecv(x, PREVIOUS, tag=3)
            return (coming, y + 1), y.sum()

        (coming, x), sums = jax.lax.scan(body, (nt.irecv(x, PREVIOUS, tag=3), x), jnp.arange(steps))
        return coming, x, sums

    coming, x, sums = pipeline(X * RANK)
    source = (RANK - steps) % SIZE
    np.testing.assert_array_equal(x, X * source + steps)
    expected = [(X * ((RANK - 1 - i) % SIZE) + i).sum() for i in range(steps)]
    np.testing.assert_allclose(sums, expected)
    nt.send(x, NEXT, tag=3)
    np.testing.assert_array_equal(nt.wait(coming), X * ((PREVIOUS - steps) % SIZE) + steps)

    @jax.jit
    def branches(x, flag):
        start = [partial(nt.irecv, x, PREVIOUS, tag=tag) for tag in (1, 2)]
        request = jax.lax.cond(flag, *start)
        nt.send(x + RANK, NEXT, tag=1)
        nt.send(x - RANK, NEXT, tag=2)
        first = nt.wait(request)
        return first, nt.recv(x, PREVIOUS)

    for flag, sign in ((True, 1), (False, -1)):
        first, second = branches(X, flag)
        np.testing.assert_array_equal(first, X + sign * PREVIOUS)
        np.testing.assert_array_equal(second, X - sign * PREVIOUS)


@pytest.mark.rule
def test_batches_are_one_message() -> None:
    def exchange(x, y):
        coming = nt.irecv(y, PREVIOUS)
        nt.wait(nt.isend(x + RANK, NEXT))
        return nt.wait(coming)

    batch = jnp.arange(24.0).reshape(2, 3, 4)
    for axis in range(3):
        got = jax.vmap(exchange, in_axes=axis, out_axes=axis)(batch, batch)
        np.testing.assert_array_equal(got, batch + PREVIOUS)
    nested = jax.jit(jax.vmap(jax.vmap(exchange, in_axes=1, out_axes=1)))
    np.testing.assert_array_equal(nested(batch, batch), batch + PREVIOUS)


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float8_e5m2", "int4", "complex64"])
def test_every_kind_of_element(dtype: str) -> None:
    x = jnp.array([1, 0, 1]).astype(dtype)
    coming = nt.irecv(x, PREVIOUS)
    nt.wait(nt.isend(x, NEXT))
    got = nt.wait(coming)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.astype(jnp.complex64), x.astype(jnp.complex64))


def test_empty_and_to_nobody() -> None:
    empty = jnp.zeros((0, 3))
    coming = nt.irecv(empty, PREVIOUS)
    nt.wait(nt.isend(empty, NEXT))
    assert nt.wait(coming).shape == (0, 3)
    coming = nt.irecv(X, m.PROC_NULL)
    nt.wait(nt.isend(X, m.PROC_NULL))
    status = MPI.Status()
    np.testing.assert_array_equal(nt.wait(coming, status=status), X * 0)
    assert (status.Get_source(), status.Get_tag()) == (MPI.PROC_NULL, MPI.ANY_TAG)


def test_status_and_mpi4py_as_the_peer() -> None:
    comm = MPI.COMM_WORLD.Clone()
    if RANK == 0:
        comm.Send(np.asarray(X), 1, tag=9)
        buffer = np.empty((2, 3), np.float32)
        comm.Recv(buffer, 1, tag=4)
        np.testing.assert_array_equal(buffer, X * 5)
    elif RANK == 1:
        status = MPI.Status()
        got = nt.wait(nt.irecv(X, comm=comm), status=status)
        np.testing.assert_array_equal(got, X)
        assert (status.Get_source(), status.Get_tag()) == (0, 9)
        assert status.Get_count(MPI.FLOAT) == 6
        nt.wait(nt.isend(X * 5, 0, tag=4, comm=comm))
    jax.effects_barrier()
    comm.Free()


def test_lengths_are_checked() -> None:
    if RANK == 0:
        for tag in (1, 2, 3):
            nt.send(X, 1, tag=tag)
    elif RANK == 1:
        with pytest.raises(Exception, match=r"irecv of float32 from rank 0 .*24 bytes.*result 16"):
            nt.wait(nt.irecv(X.ravel()[:4], 0, tag=1)).block_until_ready()
        with pytest.raises(Exception, match=r"has 24 bytes, and the result 32.*pass status="):
            nt.wait(nt.irecv(jnp.zeros(8), 0, tag=2)).block_until_ready()
        got = nt.wait(nt.irecv(jnp.ones(8), 0, tag=3), status=m.Status())
        np.testing.assert_array_equal(got, [*np.arange(6.0), 0, 0])
    nt.barrier()


def test_misuse_is_refused_by_name() -> None:
    coming = nt.irecv(X, PREVIOUS)
    nt.send(X, NEXT)
    nt.wait(coming)
    with pytest.raises(Exception, match="it was waited for before"):
        nt.wait(coming).block_until_ready()
    coming = nt.irecv(X, PREVIOUS, tag=1)
    other = dataclasses.replace(coming, dtype=np.dtype("i4"))
    with pytest.raises(Exception, match="posted for float32, and the result of wait is int32"):
        nt.wait(other).block_until_ready()
    nt.send(X * 2, NEXT, tag=1)
    np.testing.assert_array_equal(nt.wait(coming), X * 2)
    with pytest.raises(TypeError, match="must be what isend, irecv or the start"):
        nt.wait(X)
    with pytest.raises(ValueError, match="dest 1000 is not a rank"):
        nt.isend(X, 1000)
    with pytest.raises(NotImplementedError, match=r"mpi_cuda\.isend cannot be differentiated"):
        jax.grad(lambda x: (nt.isend(x, NEXT), x.sum())[1])(X)
    with pytest.raises(ValueError, match="the request was batched by vmap"):
        jax.vmap(lambda n: nt.wait(m.Request(n, None, (2,), np.dtype("f4"), m.COMM_WORLD)))(
            jnp.arange(3, dtype=jnp.uint32)
        )
    nt.barrier()


@pytest.mark.skipif(
    os.environ.get("MPI_CUDA_PRETEND_DEVICE") != "1", reason="only staged messages come in chunks"
)
def test_a_message_in_chunks_is_not_for_irecv() -> None:
    comm, x = MPI.COMM_WORLD.Clone(), jnp.zeros(2000)
    assert x.nbytes > int(os.environ["MPI_CUDA_CHUNK_BYTES"])
    for status in (None, m.Status()):
        if RANK == 0:
            nt.send(x, 1, comm=comm)
        elif RANK == 1:
            coming = nt.irecv(x, 0, comm=comm)
            with pytest.raises(Exception, match="8000 bytes and comes in chunks, which irecv"):
                nt.wait(coming, status=status).block_until_ready()
            if os.environ.get("MPI_CUDA_SHM_RING") == "0":
                # What follows the rendezvous header, out of the way.
                for _ in range(2):
                    nt.recv(jnp.zeros(1024), 0, comm=comm, status=m.Status())
    if RANK == 0:
        nt.wait(nt.isend(x, 1, comm=comm, tag=1))
    elif RANK == 1:
        with pytest.raises(Exception, match=r"came in one piece.*sent by isend"):
            nt.recv(x, 0, comm=comm, tag=1).block_until_ready()
    jax.effects_barrier()
    nt.barrier()


@pytest.mark.skipif(
    os.environ.get("MPI_CUDA_PRETEND_DEVICE") != "1"
    or os.environ.get("MPI_CUDA_SHM_RING") == "0"
    or SIZE < 3,
    reason="it is about three ranks that share memory",
)
def test_a_refused_message_leaves_that_of_another_rank_alone() -> None:
    """The first fills its sender's ring and is read last."""
    chunk = int(os.environ["MPI_CUDA_CHUNK_BYTES"]) // 4
    first, second = jnp.arange(8.0 * chunk), -jnp.arange(2.0 * chunk)
    if RANK == 0:
        nt.send(first, 1, tag=1)
        nt.send(second, 2, tag=2)
        nt.send(second + 1, 2, tag=3)
    elif RANK == 1:
        MPI.COMM_WORLD.recv(source=2)
        np.testing.assert_array_equal(nt.recv(first, 0, tag=1), first)
    elif RANK == 2:
        small = nt.irecv(jnp.zeros(2), 0, tag=2)
        MPI.COMM_WORLD.send(None, 1)
        with pytest.raises(Exception, match="comes in chunks, which irecv cannot receive"):
            nt.wait(small).block_until_ready()
        np.testing.assert_array_equal(nt.recv(second, 0, tag=3), second + 1)
    nt.barrier()


def test_a_freed_communicator_fails_what_has_no_message() -> None:
    comm = MPI.COMM_WORLD.Clone()
    coming = nt.irecv(X, PREVIOUS, comm=comm)
    MPI.COMM_WORLD.Barrier()
    comm.Free()
    with pytest.raises(Exception, match="freed before the message came"):
        nt.wait(coming).block_until_ready()
    nt.barrier()


def test_a_message_moves_while_the_program_computes() -> None:
    """Too large to be buffered by MPI: the sender is done only after the receiver took it, and the
    receiver makes no call of MPI until it knows that the sender is done."""
    path = Path(MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if RANK == 0 else None)) / "sent"
    x = jnp.arange(1 << 22, dtype=jnp.float32)
    if RANK == 0:
        nt.wait(nt.isend(x, 1))
        jax.effects_barrier()
        path.touch()
    elif RANK == 1:
        coming = nt.irecv(x, 0)
        jax.block_until_ready(coming.number)
        while not path.exists():
            time.sleep(0.01)
        np.testing.assert_array_equal(nt.wait(coming), x)
        shutil.rmtree(path.parent)
