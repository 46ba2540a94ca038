"""Bad input is a Python exception on the rank that sees it, and says what is wrong."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
X = jnp.arange(3.0)


@pytest.mark.parametrize("rank", [-7, SIZE, 1000])
def test_ranks_outside_the_communicator(rank: int) -> None:
    for call in [
        lambda: nt.send(X, rank),
        lambda: nt.recv(X, rank),
        lambda: nt.bcast(X, rank),
        lambda: nt.sendrecv(X, X, 0, rank),
    ]:
        with pytest.raises(ValueError, match=f"{rank} is not a rank .* 0 to {SIZE - 1}"):
            call()


@pytest.mark.parametrize("peer", [-7, SIZE, 1000, MPI.ANY_SOURCE])
def test_peers_of_branches_never_taken(peer: int) -> None:
    @jax.jit
    def program(take: jax.Array) -> jax.Array:
        def communicate() -> jax.Array:
            nt.send(X, peer)
            return nt.recv(X, peer)

        return jax.lax.cond(take, communicate, lambda: X)

    np.testing.assert_array_equal(program(False), X)
    with pytest.raises(Exception, match=f"send.*{peer} is not a rank .* 0 to {SIZE - 1}"):
        program(True).block_until_ready()


def test_wrong_leading_dimension() -> None:
    with pytest.raises(ValueError, match="leading dimension"):
        nt.alltoall(jnp.zeros((SIZE + 1, 2)))
    if RANK == 0:
        with pytest.raises(ValueError, match="leading dimension"):
            nt.scatter(jnp.zeros((SIZE + 1, 2)), 0)


def test_traced_ranks_point_to_static_argnums() -> None:
    with pytest.raises(TypeError, match="static_argnums"):
        jax.jit(lambda x, dest: nt.send(x, dest))(X, 0)


def test_negative_tags() -> None:
    with pytest.raises(ValueError, match="tag -5 is negative"):
        nt.send(X, 0, tag=-5)


def test_wrong_kinds_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"key<fry> cannot be sent.*key_data"):
        nt.bcast(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="tag 1180591620717411303424 is above"):
        nt.send(X, 0, tag=2**70)
    import copy

    wanted = jax.ShapeDtypeStruct((3,), np.float64)
    status = copy.deepcopy({"source": m.PROC_NULL, "tag": m.ANY_TAG})
    assert nt.recv(wanted, **status).dtype == np.float32
    with pytest.raises(TypeError, match="comm must be"):
        nt.barrier(comm="world")
    with pytest.raises(TypeError, match="op must be"):
        nt.allreduce(X, "SUM")
    with pytest.raises(TypeError, match="status must be"):
        nt.recv(X, 0, status=3)


def test_unsupported_dtypes_and_reductions_are_named() -> None:
    # Our own functions move it; a custom call with it is refused. Without a side effect only the
    # result has the error.
    call = jax.ffi.ffi_call("mpi_cuda_bcast", jax.ShapeDtypeStruct(X.shape, jnp.int4))
    with pytest.raises(Exception, match="less than 8 bits is not supported"):
        jax.jit(call)(X.astype(jnp.int4)).block_until_ready()
    with pytest.raises(Exception, match="there is no BAND of float32"):
        nt.allreduce(X, m.BAND).block_until_ready()
    with pytest.raises(Exception, match="there is no MAX of complex64"):
        nt.allreduce(X + 1j, m.MAX).block_until_ready()


@pytest.mark.skipif(
    "MPI_CUDA_PRETEND_NODES" in os.environ and "MPI_CUDA_CHECK" not in os.environ,
    reason="between nodes the user's communicators are compared if asked",
)
@pytest.mark.parametrize("kind", ["scatter", "bcast"])
def test_a_root_that_sends_less_is_named(kind: str) -> None:
    """Open MPI says nothing where there is room for more; MPICH does, for a broadcast."""
    comm = MPI.COMM_WORLD.Clone()
    room = jnp.ones((5, 4))
    if kind == "scatter":
        x = jnp.ones((SIZE, 4)) if RANK == 0 else room
    else:
        x = jnp.ones(4) if RANK == 0 else room
    with pytest.raises(Exception, match=rf"Rank 0: {kind} of float32.*: {kind} of float32\[5,4\]"):
        getattr(nt, kind)(x, 0, comm=comm).block_until_ready()
    MPI.COMM_WORLD.Barrier()


def test_truncation_and_short_messages() -> None:
    if RANK == 0:
        nt.send(jnp.arange(5.0), 1, tag=1)
        nt.send(jnp.arange(2.0), 1, tag=2)
    elif RANK == 1:
        with pytest.raises(
            Exception,
            match=r"recv into float32\[3\] from rank 0 with tag 1 .* has 20 bytes, .* 12",
        ):
            nt.recv(X, 0, tag=1, status=m.Status()).block_until_ready()
        with pytest.raises(Exception, match=r"message from rank 0 with tag 2 has 8 bytes, .* 12"):
            nt.recv(X, 0, tag=2).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_array_equal(nt.allreduce(X, m.SUM), X * SIZE)


def test_a_partial_element_keeps_what_arrived() -> None:
    # On a communicator of the user's the dtype is not compared.
    comm = MPI.COMM_WORLD.Dup()
    if RANK == 0:
        nt.send(jnp.arange(1, 7, dtype=jnp.uint8), 1, tag=3, comm=comm)
        nt.send(jnp.arange(1, 7, dtype=jnp.uint8), 1, tag=4, comm=comm)
    elif RANK == 1:
        got = np.asarray(nt.recv(X, 0, tag=3, comm=comm, status=m.Status())).view(np.uint8)
        np.testing.assert_array_equal(got, [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0])
        with pytest.raises(Exception, match="has 6 bytes"):
            nt.recv(X, 0, tag=4, comm=comm).block_until_ready()
    jax.effects_barrier()


@pytest.mark.parametrize("size", [1 << 8, 1 << 22])
def test_a_truncated_sendrecv_still_sends(size: int) -> None:
    """Large, too: with a plain receive Open MPI 4.1.4 then corrupts memory."""
    if RANK < 2:
        big, other = jnp.full(size, RANK, jnp.float32), 1 - RANK
        template = X if RANK == 0 else big
        try:
            got = nt.sendrecv(big, template, other, other, sendtag=5, recvtag=5)
            got.block_until_ready()
            assert RANK == 1 and float(got[-1]) == 0
        except Exception as error:
            assert RANK == 0 and f"has {4 * size} bytes, and the result 12" in str(error)


def test_an_error_nobody_reads_is_raised_at_the_barrier() -> None:
    # With a send in it, it is not run on the calling thread, which would raise at once.
    @jax.jit
    def program(x):
        nt.send(x, RANK)
        nt.allreduce(nt.recv(x, RANK), m.BOR)

    program(X)
    with pytest.raises(RuntimeError, match="there is no BOR of float32"):
        jax.effects_barrier()
    jax.effects_barrier()


def test_a_send_that_fails_leaves_the_next_one_alone() -> None:
    from mpi4py import MPI

    largest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    if largest >= 2**31 - 1:
        pytest.skip("every tag is one of this MPI's")
    x = jnp.arange(9000.0)
    if RANK == 0:
        with pytest.raises(Exception, match="tag"):
            nt.send(x, 1, tag=largest + 1)
            jax.effects_barrier()
        nt.send(x, 1)
    elif RANK == 1:
        np.testing.assert_array_equal(nt.recv(x, 0), x)
    nt.barrier()


def test_an_error_nobody_reads_is_raised_at_the_next_launch() -> None:
    from mpi_cuda import _library

    # With a send in it, it is not run on the calling thread, which would raise at once.
    @jax.jit
    def program(x):
        nt.send(x, RANK)
        nt.allreduce(nt.recv(x, RANK), m.BOR)

    program(X)
    while _library.load().mpi_cuda_in_flight():
        pass
    with pytest.raises(Exception, match="there is no BOR of float32"):
        nt.allreduce(X, m.SUM).block_until_ready()
    np.testing.assert_array_equal(nt.allreduce(X, m.SUM), X * SIZE)


def test_operations_after_a_failed_one_do_not_run() -> None:
    @jax.jit
    def program(x):
        y = nt.allreduce(x, m.BOR)
        if RANK == 0:
            nt.send(x, 1, tag=77)
        return y

    with pytest.raises(Exception, match="BOR"):
        program(X).block_until_ready()
    if RANK == 0:
        nt.send(X + 5, 1, tag=77)
    elif RANK == 1:
        np.testing.assert_array_equal(nt.recv(X, 0, tag=77), X + 5)


def test_an_array_on_another_ranks_device_has_no_data_here() -> None:
    """JAX makes an array without any data of this process; tests/c shows the plugin's refusal."""
    other = jax.devices()[(RANK + 1) % SIZE]
    with pytest.raises(Exception, match="non-addressable"):
        np.asarray(jax.device_put(np.ones(3), other))
