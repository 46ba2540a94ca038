"""Dispatch goes on: it waits neither for a peer nor for launches that wait for one."""

from __future__ import annotations

import gc
import time
from functools import partial

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
X = jnp.arange(3.0)


def test_dispatch_does_not_wait_for_the_peer() -> None:
    """mpi4py and ours in crossed order, 8 MiB: a blocking dispatch would deadlock."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    x, buffer = jnp.ones(1 << 21), np.ones(1 << 21, np.float32)
    small = jnp.ones(2)
    if RANK == 0:
        tokens = [m.send(x, 1, comm=comm), m.send(small, 1, comm=comm)]
        comm.Send(buffer, 1)
    elif RANK == 1:
        comm.Recv(buffer, 0)
        tokens = [m.recv(x, 0, comm=comm)[1], m.recv(small, 0, comm=comm)[1]]
    else:
        tokens = []
    jax.block_until_ready(tokens)
    if RANK == 0:
        y, token = m.recv(small, 1, comm=comm)
        comm.Send(buffer, 1)
        y.block_until_ready()
    elif RANK == 1:
        comm.Recv(buffer, 0)
        token = m.send(small, 0, comm=comm)
        token.block_until_ready()


def test_dispatch_does_not_wait_however_many_launches_do() -> None:
    """Hundreds of launches dispatched before the message that their peer waits for."""
    from mpi4py import MPI

    comm, count = MPI.COMM_WORLD, 150

    @partial(jax.jit, donate_argnums=0)
    def add(total, x):
        return total + x, jnp.outer(x, x)

    receive = jax.jit(lambda x: nt.recv(x, 1))
    if RANK == 0:
        total, squares, last = jnp.zeros(3), [], None
        for i in range(count):
            received = receive(X)
            total, square = add(total, received)
            # Some results are dropped, some are kept, some go through eager operations.
            if i % 10 == 0:
                squares.append(square + i)
            last = [total, received * 2, square.T]
        comm.send("dispatched", 1)
        totals = sum(range(count))
        np.testing.assert_allclose(last[0], X * count + totals)
        np.testing.assert_allclose(last[1], (X + count - 1) * 2)
        np.testing.assert_allclose(last[2], np.outer(X + count - 1, X + count - 1))
        for index, square in enumerate(squares):
            value = X + index * 10
            np.testing.assert_allclose(square, np.outer(value, value) + index * 10)
    elif RANK == 1:
        assert comm.recv(source=0) == "dispatched"
        for i in range(count):
            nt.send(X + i, 0)
    np.testing.assert_allclose(nt.allreduce(X, m.SUM), X * SIZE)


def test_deferred_launches_have_callbacks_errors_and_tokens() -> None:
    from mpi4py import MPI

    comm, count, seen = MPI.COMM_WORLD, 40, []
    receive = jax.jit(lambda x: nt.recv(x, 1, tag=3))

    @jax.jit
    def note(x):
        jax.experimental.io_callback(lambda x: seen.append(float(x[0])), None, x, ordered=True)
        return x

    @jax.jit
    def fail(x):
        return jax.pure_callback(raise_it, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def raise_it(_):
        raise ValueError("raised in a deferred launch")

    if RANK == 0:
        for _ in range(count):
            received = note(receive(X))
        deleted = note(received)
        deleted.delete()
        assert deleted.is_deleted()
        failed, after = fail(received), note(received + 1)
        token = m.barrier(comm=m.COMM_SELF)
        comm.send("dispatched", 1)
        with pytest.raises(jax.errors.JaxRuntimeError, match="raised in a deferred launch"):
            failed.block_until_ready()
        np.testing.assert_allclose(after, X + count)
        token.block_until_ready()
        jax.effects_barrier()
        assert seen == [*range(count), count - 1, count]
    elif RANK == 1:
        assert comm.recv(source=0) == "dispatched"
        for i in range(count):
            nt.send(X + i, 0, tag=3)
    np.testing.assert_allclose(nt.allreduce(X, m.SUM), X * SIZE)


def test_deferred_launches_keep_the_layout_of_their_results() -> None:
    from jax.experimental.layout import Format, Layout
    from mpi4py import MPI

    comm, count = MPI.COMM_WORLD, 40
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    columns = Format(Layout((1, 0)), device)
    x = jnp.arange(6.0).reshape(2, 3)
    receive = jax.jit(lambda x: nt.recv(x, 1, tag=4), out_shardings=columns)
    if RANK == 0:
        received = [receive(x) for _ in range(count)]
        comm.send("dispatched", 1)
        for i, y in enumerate(received):
            np.testing.assert_array_equal(y, x + i)
            assert y.format.layout.major_to_minor == (1, 0)
    elif RANK == 1:
        assert comm.recv(source=0) == "dispatched"
        for i in range(count):
            nt.send(x + i, 0, tag=4)
    np.testing.assert_allclose(nt.allreduce(X, m.SUM), X * SIZE)


def test_a_program_is_kept_no_longer_than_its_function() -> None:
    def call(number: int) -> None:
        captured = jnp.full(7919, number, jnp.float32)
        assert jax.jit(lambda x: nt.allreduce(x, m.SUM) + captured)(captured)[0] >= number

    for number in range(3):
        call(number)
    gc.collect()
    assert not [x for x in jax.live_arrays() if x.shape == (7919,)]


def test_fast_dispatch_is_taken_with_this_jax() -> None:
    from mpi_cuda._jax_patches import fast_dispatch

    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program(X)
    assert fast_dispatch.is_taken
    compiled = program.lower(X).compile()
    assert not compiled._executable.unsafe_call.ordered_effects
    assert not compiled._executable.unsafe_call.has_unordered_effects


def test_several_launches_may_wait_for_a_late_peer() -> None:
    """Dispatch goes on while the peer is late (docs/configuration.md has the limit)."""
    from mpi4py import MPI

    comm, count = MPI.COMM_WORLD, 8
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program(X).block_until_ready()
    comm.Barrier()
    if RANK == 0:
        results = [program(X + i) for i in range(count)]
        for rank in range(1, SIZE):
            comm.send("now", rank)
    else:
        assert comm.recv(source=0) == "now"
        results = [program(X + i) for i in range(count)]
    for i, result in enumerate(results):
        np.testing.assert_allclose(result, (X + i) * SIZE)


def test_collectives_in_other_groups_on_other_ranks() -> None:
    """Rank 0 runs three sums as 2 + 1, the others as 1 + 2; nobody waits on the wrong launch."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    one = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    two = jax.jit(lambda x: nt.allreduce(nt.allreduce(x, m.SUM) / SIZE, m.SUM))
    for i in range(20):
        x = X + i
        # Who waited for the others while dispatching the first would never come to the barrier.
        results = [two(x) if RANK == 0 else one(x)]
        comm.Barrier()
        results.append(one(x) if RANK == 0 else two(x))
        for result in results:
            np.testing.assert_allclose(result, x * SIZE, rtol=1e-6)


def test_dispatch_does_not_wait_for_a_peer_that_waits_in_a_callback() -> None:
    """The sum of every rank is dispatched, but rank 1's own is behind a callback that waits."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program(X).block_until_ready()

    def wait(x: np.ndarray) -> np.ndarray:
        assert comm.recv(source=0) == "dispatched"
        return x

    matrix = jnp.ones((64, 64)) / 64
    waiting = jax.jit(
        lambda a: jax.pure_callback(wait, jax.ShapeDtypeStruct((), a.dtype), (a @ a)[0, 0])
    )
    waiting = waiting.lower(matrix).compile()
    for _ in range(5):
        # In step for longer than the longest pause, so that rank 0 does look for the others.
        for _ in range(70):
            program(X).block_until_ready()
        comm.Barrier()
        held = waiting(matrix) if RANK == 1 else None
        if RANK == 0:
            # Rank 1 has dispatched its sum by now; it may not say that it is there.
            time.sleep(0.02)
        result = program(X)
        if RANK == 0:
            comm.send("dispatched", 1)
        np.testing.assert_allclose(result, X * SIZE)
        jax.block_until_ready(held)


def test_dispatch_does_not_wait_for_a_message_of_a_later_program() -> None:
    """Both ranks run one exchange, but what rank 0 receives is sent by a program after it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    source = 1 if RANK == 0 else m.PROC_NULL
    program = jax.jit(lambda x: nt.sendrecv(x, x, source, m.PROC_NULL)).lower(X).compile()
    for i in range(10):
        comm.Barrier()
        if RANK == 0:
            time.sleep(0.01)
        result = program(X + i)
        if RANK == 0:
            comm.send("dispatched", 1)
            np.testing.assert_array_equal(result, X - i)
        elif RANK == 1:
            assert comm.recv(source=0) == "dispatched"
            nt.send(X - i, 0)
    jax.effects_barrier()
