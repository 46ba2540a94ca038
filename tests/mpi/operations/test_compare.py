"""Ranks that differ in a collective all get an exception that names what each of them does.

These are the inputs for which MPI gives wrong numbers, hangs or corrupts memory (`docs/checks.md`).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
FIRST = RANK == 0
X = jnp.arange(3.0)
CHECK = os.environ.get("MPI_CUDA_CHECK") == "1"
SEVERAL_NODES = int(os.environ.get("MPI_CUDA_PRETEND_NODES", "1")) > 1
if_told = pytest.mark.skipif(
    SEVERAL_NODES and not CHECK, reason="between nodes this is compared at each operation if asked"
)


def check_all_right() -> None:
    """The ranks are at the same place again, and the numbers are right."""
    total = SIZE * (SIZE - 1) / 2
    np.testing.assert_array_equal(nt.allreduce(jnp.full(5, float(RANK)), m.SUM), np.full(5, total))
    np.testing.assert_array_equal(nt.bcast(jnp.full(2, RANK), SIZE - 1), np.full(2, SIZE - 1))


def check_refused(program: Callable[[], Any], *words: str) -> None:
    with pytest.raises(Exception, match="different") as raised:
        jax.block_until_ready(program())
    text = str(raised.value)
    assert "Rank 0: " in text, text
    for word in words:
        assert re.search(word, text), text
    check_all_right()


def both_ways(operation: Callable[[Any], Any], x: Any) -> list[Callable[[], Any]]:
    """Called as it is, in a program, and in a program that may depend on data."""

    def depends(x: Any) -> Any:
        return jax.lax.cond(x.ravel()[0] < 1000, operation, lambda x: operation(x + x), x)

    return [
        lambda: operation(x),
        lambda: jax.jit(lambda x: operation(x * 1))(x),
        lambda: jax.jit(depends)(x),
    ]


def test_reductions() -> None:
    for program in both_ways(lambda x: nt.allreduce(x, m.SUM if FIRST else m.MAX), X + RANK):
        check_refused(program, "SUM", "MAX")
    for kind in (nt.scan, nt.exscan, lambda x, op: nt.reduce(x, op, 0)):
        check_refused(lambda kind=kind: kind(X, m.SUM if FIRST else m.MIN), "SUM", "MIN")


def test_roots() -> None:
    wide = jnp.arange(3.0 * SIZE).reshape(SIZE, 3)
    root = 0 if FIRST else 1
    for program in both_ways(lambda x: nt.bcast(x, root), X + 10 * RANK):
        check_refused(program, "root 0", "root 1")
    check_refused(lambda: nt.gather(X, root), "gather", "root 0", "root 1")
    check_refused(lambda: nt.reduce(X, m.SUM, root), "reduce", "root 0", "root 1")
    check_refused(lambda: nt.scatter(wide if RANK == root else X, root), "root 0", "root 1")


@pytest.mark.parametrize(
    "dtypes",
    [("int32", "float32"), ("int8", "int32"), ("float16", "float32"), ("int16", "bfloat16")],
)
def test_dtypes(dtypes: tuple[str, str]) -> None:
    dtype = dtypes[0 if FIRST else 1]
    flat, wide = jnp.ones(4, dtype), jnp.ones((SIZE, 4), dtype)
    for program in both_ways(lambda x: nt.allreduce(x, m.SUM), flat):
        check_refused(program, *dtypes)
    for call in (
        lambda: nt.bcast(flat, 0),
        lambda: nt.allgather(flat),
        lambda: nt.gather(flat, 0),
        lambda: nt.alltoall(wide),
        lambda: nt.scatter(wide if FIRST else flat, 0),
        lambda: nt.reduce_scatter(wide, m.SUM),
        lambda: nt.scan(flat, m.SUM),
    ):
        check_refused(call, *dtypes)


@pytest.mark.parametrize("lengths", [(4, 5), (40000, 50000), (1, 1 << 20)])
def test_lengths(lengths: tuple[int, int]) -> None:
    length = lengths[0 if FIRST else 1]
    names = [rf"of float32\[{length}\]|of {length} float32" for length in lengths]
    for program in both_ways(lambda x: nt.allreduce(x, m.SUM), jnp.ones(length)):
        check_refused(program, *names)
    check_refused(lambda: nt.bcast(jnp.ones(length), 0), *names)
    check_refused(lambda: nt.allgather(jnp.ones(length)), *names)


def test_operations_in_another_order() -> None:
    def swapped() -> None:
        if FIRST:
            nt.allreduce(X, m.SUM).block_until_ready()
            nt.bcast(X, 0).block_until_ready()
        else:
            nt.bcast(X, 0).block_until_ready()
            nt.allreduce(X, m.SUM).block_until_ready()

    with pytest.raises(Exception, match=r"Rank 0: allreduce .* bcast"):
        swapped()
    # The first of both has failed on all ranks, so these are still beside each other.
    check_all_right()


@pytest.mark.parametrize(
    ("rounds", "elements"),
    [((2, 4), 3), ((10_001, 10_003), 3), ((2, 4), 1 << 21)],
    ids=["short", "many operations", "many bytes"],
)
def test_loops_of_different_lengths(rounds: tuple[int, int], elements: int) -> None:
    """Also of programs that are too long for the calling thread: one comparison for a launch."""
    own_rounds = rounds[0 if FIRST else 1]

    def program(x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, own_rounds, lambda _, x: nt.allreduce(x, m.SUM) / SIZE, x)
        return nt.allreduce(x.reshape(-1, 1), m.SUM)

    said = [f"{number} times" for number in rounds]
    check_refused(lambda: jax.jit(program)(jnp.ones(elements)), *said)


def rounds_of(times: int) -> jax.Array:
    """A number that JAX does not know when it traces."""
    return jnp.asarray(times)


def highest(x: jax.Array) -> jax.Array:
    return nt.allreduce(x, m.MAX)


def repeated(times: Any, x: jax.Array) -> jax.Array:
    """As many allreduces, if the number depends on data."""

    def body(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        return carry[0] + 1, highest(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0] < times, body, (0, x))[1]


@if_told
def test_loops_whose_length_depends_on_data() -> None:
    def after(times: Any, x: jax.Array) -> jax.Array:
        return highest(repeated(times, x))

    def fori(times: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, times, lambda _, x: highest(x), x)
        return highest(x)

    def called(times: Any, x: jax.Array) -> jax.Array:
        step = jax.jit(highest)
        x = jax.lax.fori_loop(0, times, lambda _, x: step(x), step(x))
        return step(x)

    def nested(times: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: highest(repeated(times, x)), x)

    def in_two(times: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, times, lambda _, x: highest(x), x)
        return jax.lax.fori_loop(0, 7 - times, lambda _, x: highest(x), x)

    for program in (after, fori, called, nested):
        times = rounds_of(2 if FIRST else 4)
        other = r"in loop 1 of" if program is nested else "outside of the loops of"
        words = rf"in loop [12] of {program.__name__} \(test_compare.py:[0-9]+ in ", other
        check_refused(lambda program=program, times=times: jax.jit(program)(times, X), *words)
        # It is the same program on all ranks.
        y = jax.jit(program)(rounds_of(3), X)
        np.testing.assert_array_equal(y, X)
    times = rounds_of(2 if FIRST else 4)
    check_refused(lambda: jax.jit(in_two)(times, X), "in loop 1 of in_two", "in loop 2 of in_two")


def test_ranks_may_take_different_branches_with_the_same_operations() -> None:
    def program(first: Any, x: jax.Array) -> jax.Array:
        def other(x: jax.Array) -> jax.Array:
            return -highest(x * 1) * -1

        def once(x: jax.Array) -> jax.Array:
            return repeated(1, x)

        x = jax.lax.cond(first, highest, other, x)
        x = jax.lax.cond(first, once, other, x)
        # One rank here, and the others in the next.
        x = jax.lax.cond(first, highest, lambda x: x, x)
        x = jax.lax.cond(first, lambda x: x, highest, x)
        return repeated(3, x)

    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(program)(jnp.asarray(FIRST), X), X)
    check_all_right()


def test_ranks_may_have_the_same_operations_in_different_loops_of_different_programs() -> None:
    def first(times: Any, x: jax.Array) -> jax.Array:
        return highest(repeated(times, x))

    def second(times: Any, x: jax.Array) -> jax.Array:
        return repeated(times, highest(x))

    program = first if FIRST else second
    np.testing.assert_array_equal(jax.jit(program)(rounds_of(3), X), X)
    # Or in a loop of Python.
    if FIRST:
        x = X
        for _ in range(3):
            x = highest(x)
    else:
        x = jax.jit(repeated)(rounds_of(3), X)
    np.testing.assert_array_equal(x, X)
    check_all_right()


def test_a_missing_operation() -> None:
    def program(x: jax.Array) -> jax.Array:
        if FIRST:
            m.barrier()
        return nt.allgather(x)

    check_refused(lambda: jax.jit(program)(X), "barrier", "allgather")


@if_told
def test_communicators_of_the_user() -> None:
    comm = MPI.COMM_WORLD.Dup()
    half = MPI.COMM_WORLD.Split(RANK // 2)
    check_refused(lambda: nt.allreduce(X, m.SUM if FIRST else m.MAX, comm=comm), "SUM", "MAX")
    np.testing.assert_allclose(nt.allreduce(X, m.SUM, comm=comm), X * SIZE)
    # Only the ranks of the communicator hear of it.
    if half.size == 2:
        with pytest.raises(Exception, match=r"Rank 0: bcast.*Rank 1: barrier"):
            if half.rank == 0:
                nt.bcast(X, 0, comm=half).block_until_ready()
            else:
                jax.block_until_ready(m.barrier(comm=half))
                jax.effects_barrier()
    check_all_right()
    half.Free()
    comm.Free()


@if_told
def test_a_communicator_is_freed_while_others_still_compare_its_last_operation() -> None:
    """The root of a bcast does not wait for the others, and MPI_Comm_free does not either."""
    for _ in range(30):
        comm = MPI.COMM_WORLD.Dup()
        if RANK == 0:
            time.sleep(0.003)
        np.testing.assert_array_equal(nt.bcast(X, 0, comm=comm), X)
        comm.Free()
    # Who has waited for such a record in vain compares nothing more on that communicator, and is
    # not together with the others in the next one.
    comm = MPI.COMM_WORLD.Dup()
    check_refused(lambda: nt.allreduce(X, m.SUM if FIRST else m.MAX, comm=comm), "SUM", "MAX")
    comm.Free()


def test_ranks_may_put_the_same_operations_into_different_programs() -> None:
    def first(x: jax.Array) -> jax.Array:
        return nt.allreduce(x, m.SUM)

    def second(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0] >= 0, lambda x: nt.bcast(x, 0), lambda x: x, x)

    for _ in range(3):
        if FIRST:
            y = jax.jit(lambda x: second(first(x)))(X)
        else:
            y = jax.jit(second)(jax.jit(first)(X))
        np.testing.assert_allclose(y, X * SIZE)
    check_all_right()


def check_all_told(
    call: Callable[[], Any], *words: str, error: Any = (TypeError, ValueError)
) -> None:
    """The first rank refuses its arguments, and the others do not wait for it."""
    if FIRST:
        with pytest.raises(error):
            call()
    else:
        with pytest.raises(Exception, match="different") as raised:
            jax.block_until_ready(call())
        for word in ("Rank 0: ", "which it refused", *words):
            assert re.search(word, str(raised.value)), raised.value


@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
def test_what_one_rank_refuses_before_it_communicates() -> None:
    wide = jnp.zeros((SIZE + 1, 2))
    x = wide if FIRST else jnp.zeros(2)
    check_all_told(lambda: nt.scatter(x, 0), "leading dimension", "scatter of")
    check_all_right()
    check_all_told(lambda: m.scatter(x, 0, comm=m.COMM_WORLD), "leading dimension")
    check_all_told(lambda: nt.allreduce(X, "SUM" if FIRST else m.SUM), "op must be")
    check_all_told(lambda: nt.bcast(X, SIZE if FIRST else 0), "is not a rank", "bcast of")
    # In a program, too, and behind what has not ended yet.
    y = jax.jit(lambda x: nt.allreduce(x, m.SUM))(X)
    check_all_told(
        lambda: nt.alltoall(wide) if FIRST else jax.jit(nt.alltoall)(wide[1:]), "alltoall of"
    )
    np.testing.assert_array_equal(y, X * SIZE)
    if not FIRST:
        with pytest.raises(Exception, match="different"):
            jax.jit(lambda x: repeated(rounds_of(2), nt.reduce(x, m.SUM, 0)))(X).block_until_ready()
    else:
        with pytest.raises(TypeError):
            nt.reduce(X, "SUM", 0)
    check_all_right()


@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
def test_a_call_that_fails_on_one_rank_before_its_launch() -> None:
    """Whatever the exception is, the next such collective has its own numbers."""
    deleted = X + 1
    if FIRST:
        deleted.delete()

    def interrupted(x: Any) -> Any:
        raise KeyboardInterrupt

    class Raises:
        __jax_array__ = interrupted

    token = {"token": m.create_token()} if FIRST else {}
    calls = {
        "deleted": (lambda: nt.allreduce(deleted, m.SUM), RuntimeError),
        "too large": (lambda: nt.allreduce(2**70 if FIRST else 3, m.SUM), OverflowError),
        "takes no token": (lambda: nt.allreduce(X, m.SUM, **token), RuntimeError),
        "KeyboardInterrupt": (
            lambda: m.allreduce(Raises() if FIRST else X, m.SUM),
            KeyboardInterrupt,
        ),
    }
    for word, (call, error) in calls.items():
        check_all_told(call, word, error=error)
        np.testing.assert_array_equal(nt.allreduce(X, m.SUM), X * SIZE)
        check_all_right()


@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
def test_a_call_that_fails_on_one_rank_on_a_communicator_of_the_users() -> None:
    """Once it has had a collective; those between neighbours too."""
    MPI = pytest.importorskip("mpi4py.MPI")
    line = MPI.COMM_WORLD.Create_cart([SIZE], [True])
    blocks, wide = jnp.ones((2, 3)), jnp.ones((5, 3))
    for _ in range(2):
        np.testing.assert_array_equal(nt.neighbor_alltoall(blocks, comm=line), blocks)
        check_all_told(
            lambda: nt.neighbor_alltoall(wide if FIRST else blocks, comm=line),
            "neighbor_alltoall",
            "must be the number of neighbours",
        )
        check_all_told(lambda: nt.bcast(X, SIZE if FIRST else 0, comm=line), "is not a rank")
        # It is the first rank's own affair if the others do none.
        if FIRST:
            with pytest.raises(ValueError, match="leading dimension"):
                nt.alltoall(wide, comm=line)
        np.testing.assert_array_equal(nt.allreduce(X, m.SUM, comm=line), X * SIZE)
    # Ones to be told that are left when it is freed hold up nothing.
    if FIRST:
        with pytest.raises(ValueError, match="leading dimension"):
            nt.alltoall(wide, comm=line)
    line.Free()
    check_all_right()


@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
def test_an_error_of_an_operation_is_no_refusal() -> None:
    """It was launched, so the others are told nothing that fails their next collective."""
    for _ in range(3):
        with pytest.raises(Exception, match="different"):
            nt.bcast(X, 0 if FIRST else 1).block_until_ready()
        check_all_right()
        with pytest.raises(Exception, match="different"):
            m.bcast(X if FIRST else X[1:], 0)[0].block_until_ready()
        np.testing.assert_array_equal(nt.bcast(X, 0), X)
        check_all_right()


def checked(x: Any, *, ordered: bool = False) -> Any:
    """`x`, if the callback on it does not fail: on the first rank it does for -1."""

    def check(x: Any) -> Any:
        if FIRST and float(np.asarray(x).ravel()[0]) == -1:
            raise ValueError("bad input")
        return np.asarray(x)

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if ordered:
        return jax.experimental.io_callback(check, shape, x, ordered=True)
    return jax.pure_callback(check, shape, x)


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
@pytest.mark.parametrize("ordered", [False, True])
def test_a_launch_that_fails_before_its_collectives(ordered: bool) -> None:
    """A callback raises on the first rank alone; everything that comes later is right."""

    def before(x: Any) -> Any:
        return nt.allreduce(checked(x, ordered=ordered), m.SUM)

    def between(x: Any) -> Any:
        y = nt.allreduce(x, m.SUM) / SIZE
        y = nt.allreduce(checked(y, ordered=ordered), m.SUM)
        return nt.allgather(y)[0]

    def in_loop(x: Any) -> Any:
        def body(_: Any, x: Any) -> Any:
            x = nt.allreduce(checked(x, ordered=ordered), m.SUM) / SIZE
            return x - (x[0] < 0) * 0

        y = jax.lax.fori_loop(0, 3, body, x, unroll=False)
        return nt.reduce(y, m.SUM, 0) if FIRST else nt.reduce(y, m.SUM, 0) * SIZE

    for program, name in ((before, "before"), (between, "between"), (in_loop, "in_loop")):
        step = jax.jit(program)
        for value in (1.0, -1.0, 2.0, -1.0, -1.0, 3.0):
            x = jnp.full(3, value)
            if value > 0:
                np.testing.assert_allclose(step(x), x * SIZE)
            elif FIRST:
                with pytest.raises(Exception, match="bad input"):
                    step(x).block_until_ready()
            else:
                with pytest.raises(Exception, match=f"launch of jit_{name} failed: .*bad input"):
                    step(x).block_until_ready()
        check_all_right()
    # It raises the last error once more, as JAX's own.
    with contextlib.suppress(Exception):
        jax.effects_barrier()


@pytest.mark.not_on_gpu("callbacks run on the CPU backend")
@pytest.mark.skipif(SEVERAL_NODES, reason="those of other nodes do not hear of it")
def test_what_depends_on_a_launch_that_has_failed() -> None:
    # Too much work for JAX to wait for it.
    large = jnp.ones((300, 300))
    failing = jax.jit(lambda x: checked(x) + 0 * (large @ large)[0, 0])
    for call in (nt.allgather, jax.jit(nt.allgather)):
        y = failing(jnp.full(3, -1.0))
        with pytest.raises(Exception, match="bad input" if FIRST else "failed: .*bad input"):
            call(y).block_until_ready()
        np.testing.assert_array_equal(nt.allgather(X)[-1], X)
        check_all_right()
    with contextlib.suppress(Exception):
        jax.effects_barrier()


def test_what_a_rank_refuses_may_be_its_own_affair() -> None:
    wide = jnp.zeros((SIZE + 1, 2))

    def refused(times: int) -> None:
        for _ in range(times):
            with pytest.raises(ValueError, match="leading dimension"):
                nt.alltoall(wide)

    for times in (1, 3, 10):
        if FIRST:
            refused(times)
        check_all_right()
        # All of them, and one more often than the others.
        refused(times + 2 * FIRST)
        check_all_right()
        y = nt.allreduce(X, m.SUM)
        if RANK == SIZE - 1:
            refused(times)
        np.testing.assert_array_equal(nt.allgather(y)[0], X * SIZE)
    # Who has only refused something waits for nobody.
    if FIRST:
        refused(2)
        nt.send(X, 1)
    elif RANK == 1:
        refused(1)
        np.testing.assert_array_equal(nt.recv(X, 0), X)
    check_all_right()


def check_message_refused(receive: Callable[[], Any], *words: str) -> None:
    if RANK == 1:
        with pytest.raises(Exception, match=words[0]) as raised:
            jax.block_until_ready(receive())
        for word in words:
            assert re.search(word, str(raised.value)), raised.value
    check_all_right()


#: Elements of the longest message that `isend` and `irecv` get: on devices it has no chunks.
LONG = 1000 if "MPI_CUDA_CHUNK_BYTES" in os.environ else 100_000


@pytest.mark.parametrize("tag", [7, m.ANY_TAG])
@pytest.mark.parametrize("source", [0, m.ANY_SOURCE])
@pytest.mark.parametrize("length", [3, 100_000])
def test_messages_of_another_type(tag: Any, source: Any, length: int) -> None:
    if FIRST:
        nt.send(jnp.ones(length, np.int32), 1, tag=7)
    words = ("message from rank 0 with tag 7", "of int32", "result is float32")
    check_message_refused(lambda: nt.recv(jnp.ones(length), source, tag=tag), *words)
    length = min(length, LONG)
    if FIRST:
        nt.send(jnp.ones(length, np.float16), 1, tag=8)
    words = ("message from rank 0 with tag 8", "of float16", "result is bfloat16")
    template = jnp.ones(length, jnp.bfloat16)
    tag = tag if tag is m.ANY_TAG else 8
    check_message_refused(lambda: nt.wait(nt.irecv(template, source, tag=tag)), *words)


NARROW = [("int8", "int4"), ("int4", "uint8"), ("int4", "int2"), ("float8_e4m3fn", "float8_e5m2")]


@pytest.mark.parametrize("dtypes", NARROW)
def test_types_that_are_bytes_to_mpi(dtypes: tuple[str, str]) -> None:
    def program() -> Any:
        return nt.bcast(jnp.ones(4, dtypes[0 if FIRST else 1]), 0)

    check_refused(program, *(rf"bcast of {dtype}\[4\]" for dtype in dtypes))
    ones = jnp.ones((SIZE, 4), dtypes[1])
    everyone, first = nt.allgather(ones[0]), nt.scatter(ones if FIRST else ones[0], 0)
    assert everyone.dtype == first.dtype == ones.dtype
    np.testing.assert_array_equal(everyone.astype(float), np.ones((SIZE, 4)))


@pytest.mark.parametrize("dtypes", NARROW)
def test_messages_of_types_that_are_bytes_to_mpi(dtypes: tuple[str, str]) -> None:
    sent, wanted = dtypes
    if FIRST:
        nt.send(jnp.ones(4, sent), 1, tag=7)
        nt.send(jnp.ones(4, wanted), 1, tag=8)
        nt.wait(nt.isend(jnp.ones(4, wanted), 1, tag=9))
    template = jnp.ones(4, wanted)
    words = (f"4 bytes of {sent}", f"result is {wanted}")
    check_message_refused(lambda: nt.recv(template, 0, tag=7), *words)
    if RANK == 1:
        for y in (nt.recv(template, 0, tag=8), nt.wait(nt.irecv(template, 0, tag=9))):
            assert y.dtype == template.dtype
            np.testing.assert_array_equal(y.astype(float), np.ones(4))
    check_all_right()


@pytest.mark.parametrize("source", [0, m.ANY_SOURCE])
@pytest.mark.parametrize("length", [3, LONG])
def test_messages_of_another_type_are_not_overtaken(length: int, source: Any) -> None:
    """The second of four is of the wrong type, and all are there; others came before."""
    if FIRST:
        other = nt.isend(jnp.ones(3), 1, tag=9)
        sent = [np.full(length, i, np.int32 if i == 1 else np.float32) for i in range(4)]
        requests = [nt.isend(x, 1, tag=7) for x in sent]
    nt.barrier()
    jax.effects_barrier()
    if RANK == 1:
        for i in range(4):
            if i == 1:
                with pytest.raises(Exception, match="of int32, and the result is float32"):
                    nt.recv(jnp.ones(length), source, tag=7).block_until_ready()
            elif i == 2:
                x = nt.wait(nt.irecv(jnp.ones(length), source, tag=7))
                np.testing.assert_array_equal(x, np.full(length, i))
            else:
                x = nt.recv(jnp.ones(length), source, tag=7)
                np.testing.assert_array_equal(x, np.full(length, i))
        np.testing.assert_array_equal(nt.recv(X, source, tag=9), np.ones(3))
    elif FIRST:
        for request in (*requests, other):
            nt.wait(request)
    check_all_right()


def test_exchanges_of_other_types() -> None:
    peer = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    mine = jnp.ones(4, jnp.int32 if FIRST else jnp.float32)
    if RANK == 1:
        with pytest.raises(Exception, match=r"16 bytes of int32, and the result is float32"):
            nt.sendrecv(mine, mine, peer[1], peer[0]).block_until_ready()
    elif FIRST:
        with pytest.raises(Exception, match=r"16 bytes of float32, and the result is int32"):
            nt.sendrecv(mine, mine, peer[1], peer[0]).block_until_ready()
    else:
        nt.sendrecv(mine, mine, peer[1], peer[0]).block_until_ready()
    check_all_right()


def test_the_tag_of_a_status_is_that_of_the_message() -> None:
    status = m.Status()
    if FIRST:
        nt.send(X, 1, tag=19)
        nt.send(X, 1, tag=20)
    elif RANK == 1:
        nt.recv(X, 0, tag=m.ANY_TAG, status=status)
        assert (status.Get_tag(), status.Get_source()) == (19, 0)
        nt.wait(nt.irecv(X, 0, tag=m.ANY_TAG), status=status)
        assert (status.Get_tag(), status.Get_source()) == (20, 0)
    check_all_right()


@pytest.mark.not_on_gpu("XLA:GPU compiles them for devices of one process")
@if_told
def test_programs_for_all_devices_that_are_known() -> None:
    mesh = jax.make_mesh((SIZE,), ("x",))
    spec = jax.P("x")

    def over(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))

    total = over(lambda x: x + jax.lax.psum(x, "x"))
    highest = over(lambda x: x + jax.lax.pmax(x, "x"))
    sharding = jax.NamedSharding(mesh, spec)
    ranks = jax.make_array_from_callback((SIZE,), sharding, lambda i: np.arange(SIZE)[i])
    for program in (total, highest, total, total, highest, highest):
        program(ranks).block_until_ready()
    for _ in range(2):
        check_refused(lambda: (total if FIRST else highest)(ranks), "SUM", "MAX")
        mine = total(ranks).addressable_shards[0].data
        np.testing.assert_array_equal(mine, [RANK + SIZE * (SIZE - 1) // 2])


def test_loops_that_ranks_write_in_another_way() -> None:
    """Their collectives are the same, so the programs may be."""

    def messages(x: jax.Array, times: int) -> jax.Array:
        if FIRST:
            jax.lax.fori_loop(0, times, lambda _, x: (nt.send(x, 1), x)[1], x)
        elif RANK == 1:
            for _ in range(3):
                nt.recv(x, 0)
        return repeated(times, x)

    own = jax.jit(repeated)

    def inner(x: jax.Array, times: int) -> jax.Array:
        call = own if FIRST else repeated
        return call(times, call(times, x))

    def weak(x: jax.Array, times: int) -> jax.Array:
        first = own(times, jnp.float32(1) if FIRST else 1.0)
        return own(times, x) + 0 * first

    for program in (messages, inner, weak):
        np.testing.assert_array_equal(jax.jit(program)(X, 3), X)
    check_all_right()
