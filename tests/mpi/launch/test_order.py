"""One order for everything: programs that XLA, threads or ranks would like to reorder."""

from __future__ import annotations

import itertools
import threading
import traceback
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import buffer_callback

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


def failing(ordered: bool, fails: Any) -> Any:
    """A program with a callback that raises if `fails`, between two operations."""

    def check(x: Any) -> Any:
        if fails(float(x[0])):
            raise ValueError("bad input")
        return np.asarray(x)

    def step(x: Any) -> Any:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        y = nt.allreduce(x, m.SUM) / SIZE
        if ordered:
            y = jax.experimental.io_callback(check, shape, y, ordered=True)
        else:
            y = jax.pure_callback(check, shape, y)
        return nt.allreduce(y, m.SUM) / SIZE

    return jax.jit(step)


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
@pytest.mark.parametrize("ordered", [False, True])
def test_a_callback_that_raised_fails_no_later_launch(ordered: bool) -> None:
    step = failing(ordered, lambda x: x == 2)
    for value in (1.0, 2.0, 3.0, 2.0, 2.0, 4.0, 5.0):
        x = jnp.full(3, value)
        if value == 2:
            with pytest.raises(Exception, match="bad input"):
                step(x).block_until_ready()
        else:
            np.testing.assert_array_equal(step(x), x)
    # Whoever waits for everything hears of the last one once.
    with pytest.raises(Exception, match="bad input"):
        step(jnp.full(3, 2.0)).block_until_ready()
    try:
        jax.effects_barrier()
    except Exception as error:
        # Since JAX 0.12 it is one of a group.
        assert "bad input" in "".join(traceback.format_exception(error))
    jax.effects_barrier()
    np.testing.assert_array_equal(step(jnp.full(3, 6.0)), np.full(3, 6.0))


def calls_back(how: str, x: Any) -> None:
    """A callback that fails the second of four times."""
    times = itertools.count(1)

    def check(x: Any) -> Any:
        bad = next(times) % 4 == 2
        if bad and how != "a wrong shape":
            raise ValueError("bad input")
        return np.zeros(2 if bad else 3, np.float32)

    def check_buffers(context: Any, result: Any, x: Any) -> None:
        check(x)

    result = jax.ShapeDtypeStruct((3,), np.float32)
    if how == "buffers":
        buffer_callback.buffer_callback(check_buffers, result, has_side_effect=True)(x)
    else:
        jax.experimental.io_callback(check, result, x, ordered=True)


@pytest.mark.parametrize("how", ["an exception", "a wrong shape", "buffers"])
def test_an_error_of_a_callback_that_nobody_reads_is_raised_later(how: str) -> None:
    words = "Incorrect output shape" if how == "a wrong shape" else "bad input"

    def body(x: Any) -> None:
        calls_back(how, x)
        nt.barrier()

    step = jax.jit(body)
    raised = []
    for value in (1.0, 2.0, 3.0, 4.0):
        try:
            step(jnp.full(3, value))
            jax.effects_barrier()
        except Exception as error:
            # Since JAX 0.12 it may be a group.
            raised.append("".join(traceback.format_exception(error)))
    assert len(raised) == 1 and words in raised[0], raised
    raised.clear()
    for value in (1.0, 2.0, 3.0, 4.0):
        try:
            step(jnp.full(3, value))
            # Long enough that it has failed, and nobody has looked.
            threading.Event().wait(0.5)
        except Exception as error:
            raised.append("".join(traceback.format_exception(error)))
    assert len(raised) == 1 and words in raised[0], raised
    jax.effects_barrier()
