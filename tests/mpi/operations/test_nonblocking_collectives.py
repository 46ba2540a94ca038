"""iallreduce and the like, and wait: against the blocking ones, in every place of a program."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nonblocking_calls
import numpy as np
import pytest
from mpi4py import MPI
from nonblocking_calls import EACH, RANK, ROOT, SIZE, X

import mpi_cuda as m
from mpi_cuda import notoken as nt
from mpi_cuda._report import record

NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
ONE_BLOCK = EACH if RANK == ROOT else EACH[0]

# A product has no derivatives, so it is none of theirs.
CALLS = {**nonblocking_calls.CALLS, "scan": (X, m.PROD)}


def test_each_gives_what_the_blocking_one_gives() -> None:
    """All in flight at once, waited for in another order, with tokens and without."""

    @jax.jit
    def without():
        started = {name: getattr(nt, f"i{name}")(*call) for name, call in CALLS.items()}
        barrier = nt.ibarrier()
        got = {name: nt.wait(request) for name, request in reversed(started.items())}
        assert nt.wait(barrier) is None
        return got

    @jax.jit
    def with_tokens(token):
        started = {}
        for name, call in CALLS.items():
            started[name], token = getattr(m, f"i{name}")(*call, token=token)
        barrier, token = m.ibarrier(token=token)
        got = {}
        for name, request in started.items():
            got[name], token = m.wait(request, token=token)
        nothing, token = m.wait(barrier, token=token)
        assert nothing is None
        return got, token

    for got in without(), with_tokens(m.create_token())[0]:
        for name, call in CALLS.items():
            np.testing.assert_array_equal(got[name], getattr(nt, name)(*call), name)


def test_every_kind_of_element() -> None:
    ones = jnp.array([1, 0, 1])
    kinds = {
        ("allreduce", m.SUM): "bool int8 uint16 int32 float16 bfloat16 complex64",
        ("allreduce", m.MAX): "bool uint8 float32 bfloat16",
        ("allgather",): "bool int8 bfloat16 float8_e5m2 int4 complex64",
    }

    @jax.jit
    def both():
        started, blocking = {}, {}
        for (name, *rest), dtypes in kinds.items():
            for dtype in dtypes.split():
                x = (ones * (RANK + 1)).astype(dtype)
                key = f"{name} {rest} {dtype}"
                started[key] = nt.wait(getattr(nt, f"i{name}")(x, *rest))
                blocking[key] = getattr(nt, name)(x, *rest)
        return started, blocking

    started, blocking = both()
    for key, got in started.items():
        assert got.dtype == blocking[key].dtype, key
        assert np.asarray(got).tobytes() == np.asarray(blocking[key]).tobytes(), key


def test_nothing_is_a_collective_too() -> None:
    empty = jnp.zeros((0, 3))
    assert nt.wait(nt.iallreduce(empty, m.SUM)).shape == (0, 3)
    assert nt.wait(nt.iallgather(empty)).shape == (SIZE, 0, 3)
    assert nt.wait(nt.ibcast(empty, 0)).shape == (0, 3)


def test_others_may_come_between_start_and_wait() -> None:
    @jax.jit
    def between(x):
        first = nt.iallreduce(x, m.SUM)
        twice = nt.allreduce(2 * x, m.SUM)
        coming = nt.irecv(x, PREVIOUS, tag=4)
        second = nt.ibcast(x, 0)
        nt.send(x, NEXT, tag=4)
        nt.barrier()
        third = nt.iallreduce(3 * x, m.SUM)
        return nt.wait(third), nt.wait(coming), nt.wait(second), twice, nt.wait(first)

    third, came, second, twice, first = between(X)
    np.testing.assert_array_equal(twice, 2 * first)
    np.testing.assert_array_equal(third, 3 * first)
    np.testing.assert_array_equal(came, X - RANK + PREVIOUS)
    np.testing.assert_array_equal(second, X - RANK)


def test_requests_go_where_arrays_can() -> None:
    """Out of one program into another, through a loop, and back from both branches."""

    @jax.jit
    def loop(x, flag):
        def body(carry, _):
            request, x = carry
            total = nt.wait(request)
            x = total / SIZE + 1
            return (nt.iallreduce(x, m.SUM), x), total[0, 0]

        first = nt.iallreduce(x, m.SUM)
        (last, x), totals = jax.lax.scan(body, (first, x), length=4)
        branches = [lambda x=x, k=k: nt.iallreduce(k * x, m.SUM) for k in (1, 2)]
        return last, jax.lax.cond(flag, *branches), x, totals

    # One that was started outside can be carried too.
    carried = jax.jit(lambda r: jax.lax.fori_loop(0, 3, lambda _, r: (nt.barrier(), r)[1], r))
    total = nt.wait(carried(nt.iallreduce(X, m.SUM)))
    np.testing.assert_array_equal(total, nt.allreduce(X, m.SUM))
    last, branch, x, totals = loop(X, True)
    mean = np.asarray(X) - RANK + (SIZE - 1) / 2
    np.testing.assert_allclose(x, mean + 4)
    np.testing.assert_allclose(totals, SIZE * (mean[0, 0] + np.arange(4.0)))
    np.testing.assert_allclose(jax.jit(nt.wait)(last), SIZE * (mean + 4))
    np.testing.assert_allclose(nt.wait(branch), SIZE * (mean + 4))


def _fails(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(Exception) as caught:
        jax.block_until_ready(call())
    for one in words:
        assert one in str(caught.value), f"{one!r} is not in {caught.value}"


def test_a_start_that_differs_between_ranks_is_an_error_on_all() -> None:
    for first, other, words in (
        (
            lambda: nt.iallreduce(X, m.SUM),
            lambda: nt.allreduce(X, m.SUM),
            ("iallreduce of", "allreduce of"),
        ),
        (
            lambda: nt.iallreduce(X, m.SUM),
            lambda: nt.iallreduce(X, m.MAX),
            ("with SUM", "with MAX"),
        ),
        (
            lambda: nt.iallgather(X),
            lambda: nt.iallgather(X[0]),
            ("of float32[2,3]", "of float32[3]"),
        ),
        (lambda: nt.ibcast(X, 0), lambda: nt.ibcast(X, 1), ("with root 0", "with root 1")),
        (lambda: nt.ibarrier(), lambda: nt.ireduce(X, m.SUM, 0), ("ibarrier", "ireduce of")),
    ):

        def number(call):
            made = call()
            return made.number if isinstance(made, m.Request) else made

        _fails(lambda first=first, other=other: number(first if RANK == 0 else other), *words)
    np.testing.assert_array_equal(nt.wait(nt.ibcast(X, 0)), X - RANK)


def test_a_communicator_may_be_freed_before_the_wait() -> None:
    comm = MPI.COMM_WORLD.Clone()
    # Long enough that they are on their way when it is freed.
    x = jnp.full(2_500_000, RANK + 1.0)
    requests = [nt.iallreduce(k * x, m.SUM, comm=comm) for k in range(1, 5)]
    comm.Free()
    for k, request in enumerate(requests, 1):
        np.testing.assert_array_equal(nt.wait(request), k * nt.allreduce(x, m.SUM))


def test_the_flight_recorder_knows_start_and_wait(tmp_path: Path) -> None:
    jax.block_until_ready(nt.wait(nt.iscatter(ONE_BLOCK, ROOT)))
    m.write_record(tmp_path / "record")
    start, wait = record.read(tmp_path / "record").operations[-2:]
    assert str(start) == f"iscatter of 2 float32 with root {ROOT}"
    assert str(wait) == "wait for iscatter of 2 float32"
    assert start.collective and not wait.collective


def test_misuse_is_refused_by_name() -> None:
    request = nt.iallreduce(X, m.SUM)
    with pytest.raises(ValueError, match="iallreduce has no status to fill"):
        nt.wait(request, status=m.Status())
    other = dataclasses.replace(request, dtype=np.dtype("i4"))
    _fails(lambda: nt.wait(other), "iallreduce of float32[2,3] with SUM: it was posted for float32")
    other = dataclasses.replace(request, comm=m.COMM_WORLD)
    _fails(lambda: nt.wait(other), "it was started on communicator number", "wait names number")
    as_message = dataclasses.replace(request, started=None)
    _fails(lambda: nt.wait(as_message, status=m.Status()), "a collective has no status to fill")
    # What was refused can still be waited for.
    np.testing.assert_array_equal(nt.wait(request), nt.allreduce(X, m.SUM))
    _fails(lambda: nt.wait(request), "it was waited for before")
    request = nt.iallgather(X)
    smaller = dataclasses.replace(request, shape=(1, 3))
    _fails(lambda: nt.wait(smaller), f"its result has {24 * SIZE} bytes, and that of wait 12")
    np.testing.assert_array_equal(nt.wait(request), nt.allgather(X))
    no_result = dataclasses.replace(nt.ibarrier(), shape=(2,), dtype=np.dtype("f4"))
    _fails(lambda: nt.wait(no_result), "ibarrier: wait belongs to irecv and to collectives")
    nt.wait(dataclasses.replace(no_result, shape=None))
    with pytest.raises(ValueError, match="root 1000 is not a rank"):
        nt.ibcast(X, 1000)
    with pytest.raises(ValueError, match="must have shape"):
        nt.ialltoall(jnp.zeros((SIZE + 1, 2)))
    with pytest.raises(TypeError, match="no reduction of int4"):
        nt.iallreduce(X.astype("int4"), m.SUM)
    own = MPI.Op.Create(lambda a, b, _: None, commute=True)
    _fails(lambda: nt.iallreduce(X, own).number, "user-defined reduction", "use allreduce")
    nt.barrier()
    own.Free()


def test_it_moves_on_while_the_program_computes() -> None:
    """Rank 0 has its result while the others have not waited, and make no call of MPI."""
    folder = MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if RANK == 0 else None)
    path, x = Path(folder) / "done", jnp.ones(1 << 20)
    request = nt.iallreduce(x, m.SUM)
    if RANK == 0:
        np.testing.assert_array_equal(nt.wait(request), SIZE * x)
        path.touch()
    else:
        jax.block_until_ready(request.number)
        while not path.exists():
            time.sleep(0.01)
        np.testing.assert_array_equal(nt.wait(request), SIZE * x)
    nt.barrier()
    jax.effects_barrier()
    if RANK == 0:
        shutil.rmtree(folder)


def test_requests_that_are_stacked_are_waited_for_one_by_one() -> None:
    rows = jnp.arange(6.0).reshape(2, 3) + RANK
    _, stacked = jax.lax.scan(lambda c, x: (c, nt.iallreduce(x, m.SUM)), 0, rows)
    with pytest.raises(ValueError, match=r"an array of 2 requests.*jax.lax.map\(wait, requests\)"):
        nt.wait(stacked)
    np.testing.assert_allclose(jax.lax.map(nt.wait, stacked), nt.allreduce(rows, m.SUM))
