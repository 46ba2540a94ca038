"""The world and its communicators, with mpi4py in the same process."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import _library
from mpi_cuda import notoken as nt

RANK, SIZE = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
X = jnp.arange(3.0)


def test_the_world_is_mpis() -> None:
    assert jax.process_index() == RANK == m.COMM_WORLD.rank
    assert jax.process_count() == SIZE == jax.device_count()
    assert [d.process_index for d in jax.devices()] == list(range(SIZE))
    assert [d.process_index for d in jax.local_devices()] == [RANK]
    assert jax.local_devices()[0].local_hardware_id == 0
    on_gpu = _library.load().mpi_cuda_on_gpu()
    assert jax.default_backend() == ("gpu" if on_gpu else "cpu")
    assert jnp.ones(3).devices() == {jax.local_devices()[0]}


def test_local_computation_uses_the_own_device() -> None:
    y = jax.jit(lambda x: x @ x.T)(jnp.ones((4, 4)) * RANK)
    np.testing.assert_allclose(y, np.full((4, 4), 4.0 * RANK * RANK))


def test_split_dup_and_self() -> None:
    half = MPI.COMM_WORLD.Split(RANK % 2, -RANK)
    members = range(RANK % 2, SIZE, 2)
    np.testing.assert_array_equal(
        nt.allreduce(X + RANK, m.SUM, comm=half), sum(X + r for r in members)
    )
    clone = MPI.COMM_WORLD.Clone()
    np.testing.assert_array_equal(nt.allreduce(X, MPI.SUM, comm=clone), X * SIZE)
    np.testing.assert_array_equal(nt.allreduce(X, MPI.SUM, comm=MPI.COMM_SELF), X)
    half.Free()
    clone.Free()


def test_private_duplicates_are_separate() -> None:
    """The same tag on COMM_WORLD, comm=None and mpi4py's COMM_WORLD: three separate messages."""
    if RANK == 0:
        nt.send(X + 1, 1, tag=3, comm=MPI.COMM_WORLD)
        nt.send(X + 2, 1, tag=3)
        jax.effects_barrier()
        MPI.COMM_WORLD.Send(np.asarray(X + 3), 1, tag=3)
    elif RANK == 1:
        buffer = np.empty(3, np.float32)
        MPI.COMM_WORLD.Recv(buffer, 0, tag=3)
        np.testing.assert_array_equal(buffer, X + 3)
        np.testing.assert_array_equal(nt.recv(X, 0, tag=3), X + 2)
        np.testing.assert_array_equal(nt.recv(X, 0, tag=3, comm=MPI.COMM_WORLD), X + 1)


def test_two_members_of_a_communicator_may_talk_alone() -> None:
    comm = MPI.COMM_WORLD.Clone()
    if RANK == 0:
        nt.send(X, 1, comm=comm)
    elif RANK == 1:
        np.testing.assert_array_equal(nt.recv(X, 0, comm=comm), X)
    jax.effects_barrier()
    MPI.COMM_WORLD.Barrier()
    comm.Free()


def test_freeing_waits_and_a_freed_one_is_refused() -> None:
    comm = MPI.COMM_WORLD.Clone()
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM, comm=comm))
    results = [program(X + i) for i in range(8)]
    comm.Free()
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y, (X + i) * SIZE)
    with pytest.raises(Exception, match="freed"):
        program(X).block_until_ready()


def test_communicators_as_arguments_and_keys() -> None:
    split = MPI.COMM_WORLD.Split(0, -RANK)
    ours = m.as_comm(split)
    assert ours == m.as_comm(split) != m.COMM_WORLD and ours.rank == SIZE - 1 - RANK
    assert {ours: 1, m.COMM_WORLD: 2}[m.as_comm(split)] == 1
    traced = []

    def program(x, comm):
        traced.append(comm)
        return nt.bcast(x, 0, comm=comm)

    for function in (jax.jit(program), jax.jit(program, static_argnames="comm")):
        for _ in range(2):
            np.testing.assert_array_equal(function(X + RANK, comm=ours), X + SIZE - 1)
            np.testing.assert_array_equal(function(X + RANK, comm=m.COMM_WORLD), X)
    assert len(traced) == 4
    with pytest.raises(ValueError, match="this rank is not in it"):
        nt.barrier(comm=MPI.COMM_NULL)


def test_names_of_old_mpi4jax() -> None:
    from mpi_cuda.experimental import auto_tokenize, notoken

    assert notoken is nt and not m.has_sycl_support()
    np.testing.assert_array_equal(auto_tokenize(lambda x: nt.allreduce(x, m.SUM))(X), X * SIZE)


def test_status_of_mpi4py() -> None:
    status = MPI.Status()
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    result = nt.sendrecv(X + RANK, X, MPI.ANY_SOURCE, right, sendtag=RANK, status=status)
    result.block_until_ready()
    assert (status.Get_source(), status.Get_tag()) == (left, left)
    assert status.Get_count(MPI.FLOAT) == 3


def test_mpi4py_constants() -> None:
    np.testing.assert_array_equal(nt.recv(X, MPI.PROC_NULL), np.zeros(3))
    for name in ("SUM", "PROD", "MIN", "MAX"):
        ours = nt.allreduce(X + RANK, getattr(m, name))
        np.testing.assert_array_equal(nt.allreduce(X + RANK, getattr(MPI, name)), ours)
    for name in ("MAXLOC", "MINLOC", "REPLACE", "NO_OP"):
        with pytest.raises(TypeError, match=f"reduction {name} is not supported"):
            nt.allreduce(X, getattr(MPI, name))


def test_intercommunicators_are_refused() -> None:
    comm = MPI.COMM_WORLD.Split(min(RANK, 1), RANK)
    inter = comm.Create_intercomm(0, MPI.COMM_WORLD, 1 - min(RANK, 1), 5)
    with pytest.raises(TypeError, match="Intracomm"):
        nt.barrier(comm=inter)
    inter.Free()
    comm.Free()


def test_a_communicator_with_older_attributes_is_freed_before_the_wait() -> None:
    """MPICH frees it then, whatever our attribute's delete function says."""
    key = MPI.Comm.Create_keyval()
    for _ in range(10):
        comm = MPI.COMM_WORLD.Dup()
        comm.Set_attr(key, "older than ours")
        request = nt.ibarrier(comm=comm)
        jax.block_until_ready(request.number)
        comm.Free()
        nt.wait(request)
        # It may have the handle of the one that was freed.
        other = MPI.COMM_WORLD.Dup()
        jax.effects_barrier()
        other.barrier()
        other.Free()
