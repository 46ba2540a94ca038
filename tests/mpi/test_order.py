"""One order for everything: programs that XLA, threads or ranks would like to reorder."""

from __future__ import annotations

import gc
import os
import threading
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


def test_independent_messages_arrive_in_trace_order() -> None:
    count = 20

    @jax.jit
    def sender(x):
        for i in reversed(range(count)):
            nt.send(x + i, 1)

    @jax.jit
    def receiver(x):
        return [nt.recv(x, 0) for _ in range(count)]

    if RANK == 0:
        sender(X)
    elif RANK == 1:
        got = [float(y[0]) for y in receiver(X)]
        assert got == [float(i) for i in reversed(range(count))]


def test_the_classical_mistake_does_not_deadlock() -> None:
    """Send and receive with neither token passed on, 4 MiB: only the order saves them."""
    x = jnp.ones(1 << 20) * RANK

    @jax.jit
    def exchange(x):
        if RANK == 0:
            m.send(x, 1)
            y, _ = m.recv(x, 1)
        else:
            y, _ = m.recv(x, 0)
            m.send(x, 0)
        return y

    if RANK < 2:
        np.testing.assert_array_equal(exchange(x), np.full(1 << 20, 1.0 - RANK))


def test_both_styles_and_callbacks_share_one_order() -> None:
    seen: list[float] = []

    @jax.jit
    def program(x):
        y = nt.allreduce(x, m.SUM)
        jax.experimental.io_callback(lambda v: seen.append(float(v)), None, y[0], ordered=True)
        z, token = m.allreduce(x * 2, m.SUM)
        jax.experimental.io_callback(lambda v: seen.append(float(v)), None, z[0], ordered=True)
        w = nt.allreduce(x * 3, m.SUM)
        jax.experimental.io_callback(lambda v: seen.append(float(v)), None, w[0], ordered=True)
        return token

    program(jnp.ones(2)).block_until_ready()
    jax.effects_barrier()
    assert seen == [SIZE, 2 * SIZE, 3 * SIZE]


def test_callback_between_operations_runs_between_them() -> None:
    """Rank 1's callback sees what rank 0 sent before, and delays what it sends after."""
    from mpi4py import MPI

    log: list[str] = []

    def note(_: np.ndarray) -> None:
        log.append("callback")
        if RANK == 1:
            MPI.COMM_WORLD.send("hello", 0, tag=9)
        elif RANK == 0:
            assert MPI.COMM_WORLD.recv(source=1, tag=9) == "hello"

    @jax.jit
    def program(x):
        y = nt.allreduce(x, m.SUM)
        jax.experimental.io_callback(note, None, x[0], ordered=True)
        return nt.allreduce(y, m.SUM)

    np.testing.assert_array_equal(program(X), X * SIZE * SIZE)
    jax.effects_barrier()
    assert log == ["callback"]


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
def test_what_a_callback_launches_comes_before_what_was_dispatched_after_its_program() -> None:
    """Even if that is already queued behind it: the callback waits until it is."""
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    dispatched = threading.Event()
    order: list[str] = []

    def callback(x: np.ndarray) -> np.ndarray:
        dispatched.wait()
        result = np.asarray(total(jnp.asarray(x)))
        order.append("callback")
        return result

    matrix = jnp.eye(128)
    shape = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
    program = jax.jit(lambda a: jax.pure_callback(callback, shape, a @ a))
    first = program(matrix)
    later = [total(X + i) for i in range(3)]
    dispatched.set()
    for i, result in enumerate(later):
        np.testing.assert_allclose(result, (X + i) * SIZE)
    assert order == ["callback"]
    np.testing.assert_allclose(first, np.eye(128) * SIZE)


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
def test_a_callback_in_the_background_communicates_through_jax() -> None:
    """What it launches belongs to its own program's place in the order."""
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))

    def callback(x: np.ndarray) -> np.ndarray:
        return np.asarray(total(jnp.asarray(x)) * 2)

    @jax.jit
    def program(a):
        y = nt.allreduce(a @ a, m.SUM)
        z = jax.pure_callback(callback, jax.ShapeDtypeStruct(a.shape, a.dtype), y)
        return nt.allreduce(z, m.SUM)

    a = jnp.eye(64)
    results = [program(a) for _ in range(3)]
    after = total(a)
    for result in results:
        np.testing.assert_allclose(result, np.eye(64) * 2 * SIZE**3)
    np.testing.assert_allclose(after, np.eye(64) * SIZE)


def test_a_function_called_twice_and_nested_jit() -> None:
    @jax.jit
    def talk(x):
        if RANK == 0:
            nt.send(x, 1)
            return x
        if RANK == 1:
            return nt.recv(x, 0)
        return x

    @jax.jit
    def program(x):
        return [talk(x + i) for i in range(5)]

    for i, y in enumerate(program(X)):
        np.testing.assert_array_equal(y, X + i)


def test_many_small_calls_without_waiting() -> None:
    step = jax.jit(lambda x, i: nt.allreduce(x, m.SUM) / SIZE + i)
    x = X
    for i in range(300):
        x = step(x, float(i % 3))
    np.testing.assert_allclose(x, X + 300, rtol=1e-6)


def test_different_programs_in_flight_stay_in_launch_order() -> None:
    add = [jax.jit(lambda x, i=i: nt.allreduce(x + i, m.SUM)) for i in range(4)]
    gather = jax.jit(lambda x: nt.allgather(x))
    results = []
    for i in range(40):
        results.append(add[i % 4](X))
        results.append(gather(X + RANK))
    for i in range(40):
        np.testing.assert_allclose(results[2 * i], (X + i % 4) * SIZE)
        np.testing.assert_allclose(results[2 * i + 1], np.stack([X + r for r in range(SIZE)]))


def test_large_and_small_programs_keep_their_order() -> None:
    """A long computation before an operation must not let a later cheap program overtake it."""
    matrix = jnp.ones((300, 300)) / 300
    slow = jax.jit(lambda a: nt.allreduce((a @ a @ a @ a)[0, :3], m.SUM))
    fast = jax.jit(lambda x: nt.allreduce(x, m.PROD))
    for _ in range(10):
        first, second = slow(matrix), fast(X + 1)
        np.testing.assert_allclose(second, (X + 1) ** SIZE)
        np.testing.assert_allclose(first, np.full(3, SIZE / 300), rtol=1e-5)


def test_threads_launch_in_one_order() -> None:
    """Each rank's threads take turns; XLA could run their small programs at once."""
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program(X).block_until_ready()
    turn = threading.Condition()
    state = {"next": 0}
    results: dict[int, jax.Array] = {}

    def worker(me: int) -> None:
        for i in range(me, 40, 4):
            with turn:
                turn.wait_for(lambda i=i: state["next"] == i)
                results[i] = program(X + i)
                state["next"] += 1
                turn.notify_all()

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(40):
        np.testing.assert_allclose(results[i], (X + i) * SIZE)


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


def test_unused_operations_are_not_deleted() -> None:
    @jax.jit
    def program(x):
        if RANK == 0:
            nt.send(x, 1)
        elif RANK == 1:
            nt.recv(x, 0)
        return x

    for _ in range(5):
        program(X)
    jax.effects_barrier()
    np.testing.assert_array_equal(nt.allreduce(X, m.SUM), X * SIZE)


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


def test_which_programs_are_the_same_on_every_rank() -> None:
    """Only those may wait for their peers on the calling thread (`_jax_patches/uniform.py`)."""
    if SIZE == 1:
        return

    def marked(function, *args) -> bool:
        return "mpi_cuda_uniform_" in jax.jit(function).lower(*args).as_text()

    def total(x):
        return nt.allreduce(x, m.SUM)

    assert marked(lambda x: nt.bcast(total(x), 0), X)
    assert marked(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: total(y), x), X)
    assert marked(lambda x: jax.jit(total)(x) + jax.checkpoint(total)(x), X)
    assert not marked(lambda x: jax.lax.cond(x[0] > 0, total, lambda y: y, x), X)
    assert not marked(lambda x: jax.lax.while_loop(lambda y: y[0] < 9, total, x), X)
    assert not marked(lambda x: jax.lax.fori_loop(0, x[0].astype(int), lambda i, y: total(y), x), X)
    assert marked(lambda x: nt.sendrecv(total(x), x, RANK, RANK), X)
    assert not marked(lambda x: nt.sendrecv(x, x, m.ANY_SOURCE, RANK), X)
    assert not marked(lambda x: nt.sendrecv(x, x, RANK, RANK, sendtag=1, recvtag=2), X)
    assert not marked(lambda x: nt.send(x, RANK), X)
    assert not marked(lambda x: nt.allreduce(total(x), m.SUM, comm=m.COMM_SELF), X)
    assert not marked(total, jnp.ones(1 << 22))


def test_exchanges_one_after_the_other() -> None:
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    shift = jax.jit(lambda x: nt.sendrecv(x, x, left, right))
    back = jax.jit(lambda x: nt.sendrecv(x, x, right, left, sendtag=3, recvtag=3))
    many = jax.jit(
        lambda x: jax.lax.fori_loop(0, SIZE, lambda i, y: nt.sendrecv(y, y, left, right), x)
    )
    for i in range(50):
        x = X + RANK + i
        np.testing.assert_array_equal(shift(x), X + left + i)
        np.testing.assert_array_equal(back(shift(x)), x)
        np.testing.assert_array_equal(many(x), x)


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


def launches_on_callers() -> int:
    from mpi_cuda import _library

    return int(_library.load().mpi_cuda_launches_on_callers())


@pytest.mark.skipif(
    SIZE != 2 or len(os.sched_getaffinity(0)) < SIZE, reason="ranks without cores are not in step"
)
@pytest.mark.not_on_gpu("XLA:GPU launches on a thread of its own")
def test_ranks_in_step_run_small_programs_on_the_calling_thread() -> None:
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    exchange = jax.jit(lambda x: nt.sendrecv(x, x, (RANK - 1) % SIZE, (RANK + 1) % SIZE))
    for function in (program, exchange):
        before = launches_on_callers()
        # After failures a rank looks at every 64th launch only, and other work may keep it busy.
        for _ in range(40):
            for _ in range(200):
                function(X).block_until_ready()
            everywhere = program(jnp.float32(launches_on_callers() > before)) == SIZE
            if everywhere:
                break
        assert everywhere


def test_an_error_on_the_calling_thread_is_raised_once() -> None:
    """Whichever thread ran it: the caller sees it, and the next call is a new one."""
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    bad = jax.jit(lambda x: nt.allreduce(x, m.BOR)).lower(X).compile()
    for _ in range(20):
        program(X).block_until_ready()
        try:
            bad(X).block_until_ready()
        except (RuntimeError, ValueError) as error:
            assert "there is no BOR of float32" in str(error)
        else:
            raise AssertionError("no error")
        np.testing.assert_allclose(program(X), X * SIZE)
