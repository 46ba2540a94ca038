"""Messages of both sorts mixed: short ones, which ranks of a node send in shared memory, and longer
ones, which go through MPI. Their order is that of one sort alone."""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE
#: Numbers of 4 bytes: beside the envelope, in a place of their own, in several, and through MPI.
SHORTEST, SHORT, SEVERAL, LONGEST, LONG = 2, 9, 700, 4096, 4097

pytestmark = pytest.mark.skipif(SIZE == 1, reason="needs other ranks")


def message(number: int, length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.float32) + 1000 * number


def check(found: list[jax.Array], numbers: list[int], lengths: list[int]) -> None:
    for got, number, length in zip(found, numbers, lengths, strict=True):
        np.testing.assert_array_equal(got, message(number, length), f"message {number}")


@pytest.mark.parametrize("comm", [None, m.COMM_WORLD], ids=["default", "world"])
def test_more_messages_than_a_mailbox_holds_come_in_their_order(comm: m.Comm | None) -> None:
    """Those that find it full go through MPI."""
    lengths = [SEVERAL if i % 7 == 3 else SHORT if i % 3 else SHORTEST for i in range(90)]
    numbers = list(range(len(lengths)))

    @jax.jit
    def send() -> None:
        for number, length in zip(numbers, lengths, strict=True):
            nt.send(message(number, length), NEXT, tag=5, comm=comm)

    @jax.jit
    def receive() -> list[jax.Array]:
        return [nt.recv(message(0, length), PREVIOUS, tag=5, comm=comm) for length in lengths]

    for _ in range(3):
        send()
        nt.barrier()
        check(receive(), numbers, lengths)


def test_long_ones_come_among_short_ones_in_their_order() -> None:
    kinds = [SHORT, LONG, LONGEST, SHORTEST, LONG, SEVERAL, SHORT]
    lengths = [kinds[i % 7] for i in range(70)]

    @jax.jit
    def send() -> None:
        for number, length in enumerate(lengths):
            nt.send(message(number, length), NEXT)

    @jax.jit
    def receive() -> list[jax.Array]:
        return [nt.recv(message(0, length), PREVIOUS) for length in lengths]

    for _ in range(3):
        # MPI may have a send of a long one wait for its receive: not all send first.
        if RANK % 2:
            check(receive(), list(range(70)), lengths)
            send()
        else:
            send()
            check(receive(), list(range(70)), lengths)


def test_tags_are_received_in_another_order() -> None:
    tags = [3, 1, 2, 1, 3, 2, 1, 1, 2, 3]
    lengths = [SHORT, LONG, SHORTEST, SEVERAL, LONG, LONGEST, SHORTEST, LONG, SHORT, SHORT]
    order = sorted(range(len(tags)), key=lambda place: -tags[place])

    @jax.jit
    def program() -> list[jax.Array]:
        # MPI may have a send of a long one wait for its receive.
        going = [
            nt.isend(message(number, length), NEXT, tag=tag)
            for number, (tag, length) in enumerate(zip(tags, lengths, strict=True))
        ]
        received = [nt.recv(message(0, lengths[i]), PREVIOUS, tag=tags[i]) for i in order]
        for one in going:
            nt.wait(one)
        return received

    for _ in range(3):
        check(program(), order, [lengths[i] for i in order])


def test_started_receives_come_first() -> None:
    lengths = [SHORT, LONG, SHORTEST, SEVERAL, LONG, SEVERAL]

    @jax.jit
    def program() -> list[jax.Array]:
        started = [nt.irecv(message(0, length), PREVIOUS, tag=4) for length in lengths[:4]]
        going = [nt.isend(message(i, length), NEXT, tag=4) for i, length in enumerate(lengths)]
        last = [nt.recv(message(0, length), PREVIOUS, tag=4) for length in lengths[4:]]
        first = [nt.wait(one) for one in reversed(started)]
        for one in going:
            nt.wait(one)
        return [*reversed(first), *last]

    for _ in range(3):
        check(program(), list(range(len(lengths))), lengths)


def test_from_anybody_with_any_tag() -> None:
    """Each sender's messages come in their order, and the status says whose they are."""
    lengths = [SHORT, LONG, SEVERAL, LONG, SHORT]
    if RANK:
        for number, length in enumerate(lengths):
            nt.send(message(RANK * 100 + number, length), 0, tag=number)
    else:
        for number, length in enumerate(lengths):
            for source in range(1, SIZE):
                status = MPI.Status()
                got = nt.recv(jnp.zeros(length), source, tag=m.ANY_TAG, status=status)
                assert (status.Get_source(), status.Get_tag()) == (source, number)
                assert status.Get_count(MPI.FLOAT) == length
                check([got], [source * 100 + number], [length])
    nt.barrier()
    # All of a length, from whoever comes first.
    if RANK:
        for number in range(40):
            nt.send(message(RANK * 100 + number, SHORT), 0, tag=number)
    else:
        next_of = dict.fromkeys(range(1, SIZE), 0)
        for _ in range(40 * (SIZE - 1)):
            status = MPI.Status()
            got = nt.recv(jnp.zeros(SHORT), m.ANY_SOURCE, tag=m.ANY_TAG, status=status)
            source = status.Get_source()
            assert status.Get_tag() == next_of[source]
            assert status.Get_count(MPI.FLOAT) == SHORT
            check([got], [source * 100 + next_of[source]], [SHORT])
            next_of[source] += 1


@pytest.mark.parametrize("length", [0, SHORTEST, SHORT, SEVERAL, LONGEST, LONG])
def test_exchanges_with_oneself_nobody_and_all(length: int) -> None:
    x = message(RANK, length)
    np.testing.assert_array_equal(nt.sendrecv(x, x, RANK, RANK), x)
    np.testing.assert_array_equal(nt.sendrecv(x, x, m.PROC_NULL, m.PROC_NULL), jnp.zeros(length))
    # Around the ring, where both ends send to nobody or receive from nobody.
    up, down = (RANK + 1 if RANK < SIZE - 1 else m.PROC_NULL), RANK - 1 if RANK else m.PROC_NULL
    got = nt.sendrecv(x, x, down, up)
    np.testing.assert_array_equal(got, message(RANK - 1, length) if RANK else jnp.zeros(length))
    loop = jax.jit(
        lambda x: jax.lax.fori_loop(0, 100, lambda _, y: nt.sendrecv(y, y, PREVIOUS, NEXT), x)
    )
    np.testing.assert_array_equal(loop(x), message((RANK - 100) % SIZE, length))


@pytest.mark.parametrize("wrong", ["dtype", "length"])
def test_a_short_message_that_does_not_fit_is_an_error_and_gone(wrong: str) -> None:
    sent = message(1, SHORT).astype("int32" if wrong == "dtype" else "float32")
    result = jnp.zeros(SHORT if wrong == "dtype" else SHORTEST)
    nt.send(sent, NEXT, tag=6)
    nt.send(message(2, SHORT), NEXT, tag=6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="int32" if wrong == "dtype" else "36"):
        nt.recv(result, PREVIOUS, tag=6).block_until_ready()
    check([nt.recv(message(0, SHORT), PREVIOUS, tag=6)], [2], [SHORT])


def test_random_messages() -> None:
    """Every rank knows what all ranks send; each receives in an order of its own, by source and
    tag."""
    random = np.random.default_rng(20)
    lengths = random.choice([SHORTEST, SHORT, SEVERAL, LONGEST, LONG], 60)
    # Not to oneself: an MPI may want the receive of a long one to be started first.
    steps = random.integers(1, SIZE, 60)
    pairs = [
        (int(a), int(a + b) % SIZE)
        for a, b in zip(random.integers(0, SIZE, 60), steps, strict=True)
    ]
    tags = random.integers(0, 3, 60)
    mine = [i for i, (_, dest) in enumerate(pairs) if dest == RANK]
    # By tag and source in an order drawn anew; among equal ones in the order of sending.
    draw = random.permutation(3 * SIZE)
    order = sorted(mine, key=lambda i: draw[tags[i] * SIZE + pairs[i][0]])

    @partial(jax.jit, static_argnums=0)
    def program(seed: int) -> list[jax.Array]:
        going = [
            nt.isend(message(i + seed, int(lengths[i])), dest, tag=int(tags[i]))
            for i, (source, dest) in enumerate(pairs)
            if source == RANK
        ]
        received = [
            nt.recv(message(0, int(lengths[i])), pairs[i][0], tag=int(tags[i])) for i in order
        ]
        for one in going:
            nt.wait(one)
        return received

    for _ in range(5):
        check(program(0), order, [int(lengths[i]) for i in order])


def test_a_wait_for_something_else_sleeps_while_a_message_lies_here() -> None:
    """A send that is too long to be sent before its receiver takes part."""
    if RANK > 1:
        return
    x = jnp.zeros(1 << 21)
    if RANK == 0:
        nt.send(message(1, SHORT), 1)
        time.sleep(1)
        nt.recv(x, 1).block_until_ready()
    else:
        request = nt.isend(x, 0)
        time.sleep(0.2)
        start = time.process_time()
        # The wait has no result; what comes behind it has.
        nt.wait(request)
        check([nt.recv(message(0, SHORT), 0)], [1], [SHORT])
        assert time.process_time() - start < 0.4
