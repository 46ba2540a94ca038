"""What host callbacks launch: it belongs to the launch, and to the thread, whose callback it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

pytestmark = pytest.mark.not_on_gpu("callbacks run on the CPU backend")
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
X = jnp.arange(3.0)
# XLA runs programs with a product of the first on the calling thread, and of the second elsewhere.
SIZES = [3, 128]
total = jax.jit(lambda x: nt.allreduce(x, m.SUM))


def calling(callback: Callable[[jax.Array], Any]) -> Any:
    """A program without operations that returns what the callback makes of its argument."""

    def program(a: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(a.shape, a.dtype)
        return jax.pure_callback(lambda a: np.asarray(callback(a)), shape, a @ a)

    return jax.jit(program)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("main_is_first", [True, False])
def test_a_threads_callback_waits_for_no_launch_of_the_main_thread(
    size: int, main_is_first: bool
) -> None:
    """Rank 0's main thread waits for the others', which wait for their other thread."""
    comm = MPI.COMM_WORLD.Dup()
    own = jax.jit(lambda x: nt.allreduce(x, m.MAX, comm=comm))
    inside, go_on = threading.Event(), threading.Event()

    def callback(a: jax.Array) -> jax.Array:
        inside.set()
        assert go_on.wait(60)
        return own(a)

    a = jnp.eye(size)
    program, results = calling(callback), []
    jax.block_until_ready([total(X), program.lower(a).compile()])
    thread = threading.Thread(target=lambda: results.append(np.asarray(program(a))))
    if RANK == 0 and main_is_first:
        result = total(X)
        # Until its operation waits for the others.
        time.sleep(0.3)
    thread.start()
    assert inside.wait(60)
    if RANK == 0 and not main_is_first:
        result = total(X)
        time.sleep(0.3)
    go_on.set()
    if RANK != 0:
        thread.join()
        result = total(X)
    np.testing.assert_array_equal(result, X * SIZE)
    thread.join()
    np.testing.assert_array_equal(results[0], a)
    comm.Free()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_callbacks_callback_belongs_to_the_launch_around_both(size: int, in_thread: bool) -> None:
    """The program between them has no operations."""
    between = calling(total)

    @jax.jit
    def program(a: jax.Array) -> jax.Array:
        return nt.allreduce(calling(between)(nt.allreduce(a, m.SUM)), m.SUM)

    def work() -> None:
        np.testing.assert_array_equal(program(jnp.eye(size)), np.eye(size) * SIZE**6)

    if in_thread:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
    else:
        work()


@pytest.mark.skipif(SIZE == 1, reason="nobody to differ from")
def test_what_a_callback_launches_is_compared_wherever_it_runs() -> None:
    """The first thing on a communicator of the user's, on some ranks in the background."""
    comm = MPI.COMM_WORLD.Dup()
    own = jax.jit(lambda x: nt.allreduce(x, m.MAX if RANK else m.MIN, comm=comm))
    program = calling(lambda a: a + own(X).sum())
    a = jnp.eye(SIZES[RANK % 2])
    # A rank that is not compared would let MPI reduce by what differs.
    with pytest.raises(Exception, match="MAX") as error:
        np.asarray(program(a))
    assert "MIN" in str(error.value)
    # Whoever waits for everything hears of it once.
    with contextlib.suppress(Exception):
        jax.effects_barrier()
    comm.Free()
