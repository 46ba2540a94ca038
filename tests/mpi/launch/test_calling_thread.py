"""Small programs on the thread that calls them, where all ranks have come to the same one."""

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


def test_which_programs_are_the_same_on_every_rank() -> None:
    """Only those may wait for their peers on the calling thread."""
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
    assert marked(lambda x: nt.wait(nt.iallreduce(x, m.SUM)), X)
    # All ranks compare where it starts.
    started = nt.iallreduce(X, m.SUM)
    assert not marked(nt.wait, started)
    nt.wait(started)
    assert not marked(lambda x: nt.allreduce(total(x), m.SUM, comm=m.COMM_SELF), X)
    assert not marked(total, jnp.ones(1 << 22))
    assert "mpi_cuda_long_uniform_" in jax.jit(total).lower(jnp.ones(1 << 22)).as_text()


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


@pytest.mark.skipif(
    SIZE != 2 or len(os.sched_getaffinity(0)) < SIZE, reason="ranks without cores are not in step"
)
@pytest.mark.not_on_gpu("XLA:GPU launches on a thread of its own")
def test_long_programs_leave_the_calling_thread_free() -> None:
    def highest(x):
        return nt.allreduce(x, m.MAX)

    short = jax.jit(highest)
    many = jax.jit(lambda x: jax.lax.fori_loop(0, 10_001, lambda _, x: highest(x), x))
    large = jnp.ones((1 << 21) + 1)
    for program, x in ((many, X), (jax.jit(highest), large)):
        program(x).block_until_ready()
        for _ in range(40):
            before = launches_on_callers()
            for _ in range(200):
                short(X).block_until_ready()
            everywhere = short(jnp.float32(-(launches_on_callers() > before))) == -1
            if everywhere:
                break
        assert everywhere
        before = launches_on_callers()
        # The ranks are here at the same time, too, but their callers do not wait.
        for _ in range(2):
            program(x).block_until_ready()
        assert launches_on_callers() == before


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


def test_after_an_error_of_one_rank_nobody_waits_for_those_who_have_not_come() -> None:
    """Ranks still know each other's launches apart; else the first one never sends its message."""
    program = jax.jit(lambda x: nt.allreduce(x, m.SUM))
    program(X).block_until_ready()
    deleted = X + 1
    if RANK == 0:
        deleted.delete()
    with pytest.raises((RuntimeError, ValueError)):
        nt.allreduce(deleted, m.SUM).block_until_ready()
    for _ in range(20):
        for _ in range(30):
            program(X).block_until_ready()
        if RANK == 0:
            result = program(X)
            for rank in range(1, SIZE):
                MPI.COMM_WORLD.send("dispatched", rank)
        else:
            assert MPI.COMM_WORLD.recv(source=0) == "dispatched"
            result = program(X)
        np.testing.assert_array_equal(result, X * SIZE)
