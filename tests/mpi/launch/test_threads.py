"""One order for each thread: threads on different communicators do not wait for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import _library
from mpi_cuda import notoken as nt

pytestmark = pytest.mark.skipif(
    bool(_library.load().mpi_cuda_on_gpu()), reason="on GPUs all threads share one order"
)
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
X = jnp.arange(3.0)
MESH = jax.make_mesh((SIZE,), ("x",))
REPLICATED = jax.NamedSharding(MESH, jax.P())
SHARDED = jax.NamedSharding(MESH, jax.P("x"))


def together(*bodies: Callable[[], None]) -> None:
    """Runs each in a thread of its own."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        for future in [pool.submit(body) for body in bodies]:
            future.result()


def test_each_thread_with_a_communicator_of_its_own() -> None:
    """Legal in MPI; each thread waits for its own peer alone."""
    comms = [MPI.COMM_WORLD.Dup() for _ in range(4)]
    reductions = [m.SUM, m.MAX, m.MIN, m.SUM]

    def balanced(number: int) -> None:
        comm, reduction = comms[number], reductions[number]
        reduce = jax.jit(lambda x: nt.allreduce(x, reduction, comm=comm))
        x = jnp.ones(10 ** (number + 1)) * (RANK + 1)
        values = np.arange(1, SIZE + 1)
        expected = {m.SUM: values.sum(), m.MAX: values.max(), m.MIN: values.min()}[reduction]
        for _ in range(100):
            np.testing.assert_allclose(reduce(x)[0], expected)

    together(*[lambda n=n: balanced(n) for n in range(4)])
    for comm in comms:
        comm.Free()


def test_threads_that_wait_for_each_other_through_their_peers() -> None:
    """Rank 0's first thread waits for what its second one has to start on the other rank."""
    first, second = MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
    events = [threading.Event() for _ in range(2)]

    def one() -> None:
        program = jax.jit(lambda x: nt.allreduce(x, m.SUM, comm=first))
        if RANK != 0:
            # Only once the second thread is through, which began after rank 0's first.
            assert events[1].wait(60)
        np.testing.assert_allclose(program(X), X * SIZE)

    def two() -> None:
        program = jax.jit(lambda x: nt.allreduce(x, m.MAX, comm=second))
        for _ in range(50):
            np.testing.assert_allclose(program(X + RANK), X + SIZE - 1)
        events[1].set()

    together(one, two)
    for comm in (first, second):
        comm.Free()


def test_large_programs_of_several_threads() -> None:
    """Not those that XLA runs on the calling thread."""
    comms = [MPI.COMM_WORLD.Dup() for _ in range(2)]
    matrix = jnp.ones((100, 100)) / 100

    def work(number: int) -> None:
        program = jax.jit(lambda a: nt.allreduce(a @ a, m.SUM, comm=comms[number]))
        for _ in range(20):
            np.testing.assert_allclose(program(matrix), np.full((100, 100), SIZE / 100), rtol=1e-5)

    together(*[lambda n=n: work(n) for n in range(2)])
    for comm in comms:
        comm.Free()


def test_a_checkpoints_barrier_beside_training() -> None:
    """Programs for all devices of two threads: matched by what they are, not by when they come."""
    x = jax.device_put(jnp.ones(4 * SIZE), SHARDED)
    step = jax.jit(lambda w, x: w + x.sum() / x.size, donate_argnums=0, out_shardings=REPLICATED)
    total = jax.jit(lambda x: x.sum(), out_shardings=REPLICATED)
    over = threading.Event()
    rounds = 20

    def background() -> None:
        own = jax.device_put(jnp.arange(2.0 * SIZE), SHARDED)
        for i in range(rounds):
            multihost_utils.sync_global_devices(f"checkpoint {i}")
            assert float(total(own + i)) == SIZE * (2 * SIZE - 1) + 2 * SIZE * i
            gathered = multihost_utils.process_allgather(np.full(2, RANK + i))
            assert gathered.tolist() == [[r + i] * 2 for r in range(SIZE)]
        over.set()

    thread = threading.Thread(target=background)
    w = step(jax.device_put(jnp.zeros(3), REPLICATED), x)
    thread.start()
    steps = 1
    for _ in range(200):
        w = step(w, x)
        steps += 1
    np.testing.assert_allclose(w, np.full(3, float(steps)))
    thread.join()
    assert over.is_set()
    np.testing.assert_allclose(step(w, x), np.full(3, steps + 1.0))


@pytest.mark.skipif(SIZE < 4, reason="the groups share two ranks, and have a lowest one each")
def test_threads_make_communicators_of_groups_that_overlap() -> None:
    """Each group's first collective makes its communicator, in both shared ranks at once."""

    comms, together_here = [MPI.COMM_WORLD.Dup() for _ in range(2)], threading.Barrier(2)

    def work(number: int) -> None:
        members = [number, 2, 3]
        group = comms[number].Split(0 if RANK in members else 1)
        if RANK not in members:
            return
        devices = [device for device in jax.devices() if device.process_index in members]
        mesh = jax.sharding.Mesh(np.array(devices), ("x",))
        sharded, own = jax.NamedSharding(mesh, jax.P("x")), mesh.local_devices
        for length in range(1, 11):
            x = jax.make_array_from_single_device_arrays(
                (3 * length,), sharded, [jax.device_put(np.ones(length, np.float32), own[0])]
            )
            total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
            total = total.lower(x).compile()
            group.Barrier()
            if RANK > 1:
                together_here.wait()
            assert float(total(x)) == 3 * length

    together(*[lambda n=n: work(n) for n in range(2)])
    for comm in comms:
        comm.Free()


def test_a_pool_whose_threads_take_turns() -> None:
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM, comm=m.COMM_WORLD))
    y = X
    for i in range(10):
        results: list[jax.Array] = []
        thread = threading.Thread(target=lambda r=results, y=y: r.append(program(y) / SIZE + 1))
        thread.start()
        thread.join()
        y = results[0]
        if i % 2:
            y = program(y) / SIZE
    np.testing.assert_allclose(y, X + 10, rtol=1e-6)


def test_a_result_of_another_thread_is_used_and_donated() -> None:
    """It may be promised only, by a launch that waits for a peer."""
    comm = MPI.COMM_WORLD.Dup()
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM, comm=comm))
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    for i in range(20):
        results: list[jax.Array] = []
        thread = threading.Thread(target=lambda i=i, r=results: r.append(program(X + i)))
        thread.start()
        thread.join()
        result = add(results[0], X)
        total = jax.jit(lambda x: nt.allreduce(x, m.SUM))(result)
        np.testing.assert_allclose(result, (X + i) * SIZE + X)
        np.testing.assert_allclose(total, ((X + i) * SIZE + X) * SIZE)
    comm.Free()


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
def test_a_thread_whose_programs_have_callbacks() -> None:
    """They communicate through JAX; all belongs to the thread's own order."""
    seen: list[float] = []
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))

    def callback(x: np.ndarray) -> np.ndarray:
        return np.asarray(total(jnp.asarray(x)) * 2)

    @jax.jit
    def program(a):
        y = nt.allreduce(a @ a, m.SUM)
        jax.experimental.io_callback(lambda v: seen.append(float(v)), None, y[0, 0], ordered=True)
        z = jax.pure_callback(callback, jax.ShapeDtypeStruct(a.shape, a.dtype), y)
        return nt.allreduce(z, m.SUM)

    def work() -> None:
        a = jnp.eye(64)
        results = [program(a * (i + 1)) for i in range(3)]
        for i, result in enumerate(results):
            np.testing.assert_allclose(result, np.eye(64) * (i + 1) ** 2 * 2 * SIZE**3)
        jax.effects_barrier()

    together(work)
    assert seen == [SIZE, 4 * SIZE, 9 * SIZE]


def test_threads_share_their_inputs() -> None:
    """The inner plugin counts who reads a buffer without a lock, and ends a process that lost one.

    It did so in one of 8 processes that ran half of this.
    """
    comms = [MPI.COMM_SELF.Dup() for _ in range(4)]
    programs = [jax.jit(lambda x, c=comm: nt.allreduce(x, m.SUM, comm=c)) for comm in comms]
    shared = [X + i for i in range(40)]

    def work(number: int) -> None:
        for x in shared:
            for _ in range(100):
                result = programs[number](x)
        np.testing.assert_array_equal(result, X + len(shared) - 1)

    together(*[lambda n=n: work(n) for n in range(4)])
    for x in shared:
        x.delete()
    shared.clear()
    del x
    for comm in comms:
        comm.Free()


def test_results_of_every_kind_come_from_a_thread() -> None:
    @jax.jit
    def program(x):
        y, token = m.allreduce(x, m.SUM)
        empty, token = m.allreduce(jnp.zeros((0, 3)), m.SUM, token=token)
        flag = nt.allgather(x[:, 0] > RANK)
        return y.T, empty, flag, x.astype(jnp.bfloat16), token

    def work() -> None:
        x = jnp.arange(6.0).reshape(2, 3) * (RANK + 1)
        for _ in range(3):
            y, empty, flag, small, token = program(x)
            scale = sum(range(1, SIZE + 1))
            np.testing.assert_allclose(y, np.arange(6.0).reshape(2, 3).T * scale)
            assert empty.shape == (0, 3) and flag.shape == (SIZE, 2)
            assert flag.tolist() == [[False, True]] * SIZE
            np.testing.assert_array_equal(np.asarray(small, np.float32), x)
            jax.block_until_ready(token)
            # What comes from there is used as usual.
            np.testing.assert_allclose(jnp.sum(y + 1), 15 * scale + 6)

    together(work)


def test_an_error_in_a_thread_is_that_threads() -> None:
    bad = jax.jit(lambda x: nt.allreduce(x, m.BOR))
    good = jax.jit(lambda x: nt.allreduce(x, m.SUM))

    def work() -> None:
        with pytest.raises((RuntimeError, ValueError), match="there is no BOR of float32"):
            bad(X).block_until_ready()
        np.testing.assert_allclose(good(X), X * SIZE)

    together(work)
    np.testing.assert_allclose(good(X), X * SIZE)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_a_threads_program_waits_for_no_launch_of_the_main_thread(dtype: jnp.dtype) -> None:
    """One without operations. Results of 4 bits cannot be promised."""
    total = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program = jax.jit(lambda x: x.astype(dtype)).lower(X).compile()
    jax.block_until_ready(total(X))
    if RANK == 0:
        result = total(X)
        # Until its operation waits for the others.
        time.sleep(0.3)
        together(lambda: np.testing.assert_array_equal(program(X).astype(jnp.float32), X))
        for rank in range(1, SIZE):
            MPI.COMM_WORLD.send("through", rank)
    else:
        assert MPI.COMM_WORLD.recv(source=0) == "through"
        result = total(X)
    np.testing.assert_array_equal(result, X * SIZE)
