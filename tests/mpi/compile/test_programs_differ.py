"""Programs for several devices in which ranks take other branches, or run loops more often.

All ranks run the same program, so only its collectives tell that they differ. Every rank hears of
it, before MPI sees anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RANK, SIZE = jax.process_index(), jax.process_count()
MESH = Mesh(np.array(jax.devices()), ("x",))
SEVERAL_NODES = "MPI_CUDA_PRETEND_NODES" in os.environ
RING = [(i, (i + 1) % SIZE) for i in range(SIZE)]
#: Long enough that a collective of another length would write over the heap.
LENGTH = 4096 * SIZE

#: Other nodes hear of what differs among operations that all have executed only then.
at_each = pytest.mark.skipif(
    SEVERAL_NODES and "MPI_CUDA_CHECK" not in os.environ,
    reason="needs MPI_CUDA_CHECK=1 between nodes",
)

pytestmark = pytest.mark.skipif(SIZE < 2, reason="needs several ranks")


def execute(body: Callable[..., Any], mesh: Mesh = MESH) -> np.ndarray:
    """This rank's result of `body`, which gets this rank's part of ones."""
    size = mesh.devices.size
    ones = np.ones(LENGTH * size, np.float32)
    sharding = NamedSharding(mesh, P("x"))
    x = jax.make_array_from_callback(ones.shape, sharding, ones.__getitem__)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    return np.asarray(jax.jit(mapped)(x).addressable_data(0))


def is_first() -> jax.Array:
    return lax.axis_index("x") == 0


def branch(first: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """Rank 0 executes one, and the other ranks the other."""
    return lambda x: x + lax.cond(is_first(), first, others, x)


def loop(x: jax.Array, times: Any) -> jax.Array:
    """Adds all ranks' arrays so often, in a loop whose length XLA knows if Python does."""
    if isinstance(times, int):
        return lax.fori_loop(0, times, lambda _, y: lax.psum(y, "x") / SIZE + 1, x)

    def step(carry):
        return carry[0] + 1, lax.psum(carry[1], "x") / SIZE + 1

    return lax.while_loop(lambda carry: carry[0] < times, step, (0, x))[1]


def total(x: jax.Array) -> jax.Array:
    return lax.psum(x, "x")


def differ(body: Callable[..., Any], first: str, others: str, mesh: Mesh = MESH) -> None:
    """Each rank hears what each does, and the next program is right."""
    with pytest.raises(Exception, match=r"the ranks (execute|run) different") as raised:
        execute(body, mesh)
    text = str(raised.value)
    last = mesh.devices.size - 1
    rest = f"Ranks 1-{last}" if last > 1 else "Rank 1"
    assert f"Rank 0: {first}" in text, text
    # Those of a node hear what that node's ranks do.
    assert f"{': ' if SEVERAL_NODES else rest + ': '}{others}" in text, text
    np.testing.assert_array_equal(execute(total, mesh), np.full(LENGTH, mesh.devices.size))


BRANCHES = {
    "reduction": (lambda x: lax.pmax(x, "x"), f"allreduce of float32[{LENGTH}] with MAX"),
    "dtype": (
        lambda x: lax.psum(x.astype(jnp.int32), "x").astype(jnp.float32),
        f"allreduce of int32[{LENGTH}] with SUM",
    ),
    "length": (
        lambda x: jnp.tile(lax.psum(x[: LENGTH // 2], "x"), 2),
        f"allreduce of float32[{LENGTH // 2}] with SUM",
    ),
    "kind": (lambda x: lax.all_gather(x, "x").sum(0), f"allgather of float32[1,{LENGTH}]"),
    "exchange": (lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True), "alltoall of float32["),
}


@pytest.mark.parametrize("what", BRANCHES)
def test_branches_that_do_something_else(what: str) -> None:
    others, words = BRANCHES[what]
    differ(
        branch(total, others), f"XLA's allreduce of float32[{LENGTH}] with SUM", f"XLA's {words}"
    )


def test_branches_in_a_loop_and_a_loop_in_a_branch() -> None:
    def repeat(x):
        return lax.fori_loop(0, 3, lambda _, y: lax.psum(y, "x"), x)

    def both(x):
        return lax.fori_loop(0, 3, lambda _, y: branch(total, BRANCHES["reduction"][0])(y), x)

    sums = f"XLA's allreduce of float32[{LENGTH}] with SUM"
    differ(both, sums, f"XLA's {BRANCHES['reduction'][1]}")
    differ(branch(repeat, BRANCHES["length"][0]), sums, f"XLA's {BRANCHES['length'][1]}")


def test_constant_loops_of_other_lengths() -> None:
    lengths = (2, 4) if RANK == 0 else (4, 2)

    def body(x):
        return loop(loop(x, lengths[0]) * 2, lengths[1])

    differ(body, "while 2 times {", "while 4 times {")


@at_each
def test_loops_whose_length_data_decides() -> None:
    def body(x):
        return loop(
            loop(x, jnp.where(is_first(), 2, 4)) * 2,
            jnp.where(is_first(), 4, 2),
        )

    words = f"XLA's allreduce of float32[{LENGTH}] with SUM in loop"
    differ(body, f"{words} 2", f"{words} 1")


@at_each
def test_a_rank_that_is_in_the_next_program_already() -> None:
    def body(x):
        return loop(x, jnp.where(is_first(), 2, 4))

    if RANK == 0:
        execute(body)
    with pytest.raises(Exception, match=r"the ranks (run|execute) different") as raised:
        execute(total if RANK == 0 else body)
    words = f"XLA's allreduce of float32[{LENGTH}] with SUM in loop 1"
    assert "Rank 0: all-reduce" in str(raised.value) and words in str(raised.value)
    np.testing.assert_array_equal(execute(total), np.full(LENGTH, SIZE))


@pytest.mark.skipif(SIZE < 3, reason="needs a rank that is in no group")
def test_programs_of_some_ranks() -> None:
    if RANK < 2:
        some = Mesh(np.array(jax.devices()[:2]), ("x",))
        others, words = BRANCHES["length"]
        first = f"XLA's allreduce of float32[{LENGTH}] with SUM"
        differ(branch(total, others), first, f"XLA's {words}", some)
    np.testing.assert_array_equal(execute(total), np.full(LENGTH, SIZE))


def test_branches_that_do_the_same_are_right() -> None:
    """Different ones, one of them in a loop, beside an exchange of two ranks' own."""

    def again(x):
        return lax.fori_loop(0, 3, lambda _, y: lax.psum(y, "x"), x)

    def thrice(x):
        return lax.psum(lax.psum(lax.psum(x, "x"), "x"), "x")

    def body(x):
        x = lax.cond(is_first(), again, thrice, x)
        x = lax.cond(
            is_first(),
            lambda x: lax.ppermute(x, "x", RING),
            lambda x: lax.ppermute(x, "x", RING) * 2,
            x,
        )
        steps = lax.pmax(lax.axis_index("x"), "x") + 3
        return loop(lax.all_to_all(x, "x", 0, 0, tiled=True), steps)

    expected = np.repeat([1] + [2] * (SIZE - 1), LENGTH // SIZE) * SIZE**3 + SIZE + 2
    for _ in range(3):
        np.testing.assert_allclose(execute(body), expected, rtol=1e-6)
