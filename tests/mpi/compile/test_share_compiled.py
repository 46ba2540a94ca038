"""What one rank of a node compiles, the others take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt
from mpi_cuda._doctor import world

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size

pytestmark = [
    pytest.mark.skipif(
        SIZE == 1 or world.about()["node_size"] != str(SIZE),
        reason="the ranks of one node share",
    ),
    pytest.mark.not_on_gpu("each rank compiles for its own"),
]


@pytest.fixture(autouse=True)
def without_cache() -> Iterator[None]:
    """A rank that finds what another one has left in JAX's cache compiles nothing."""
    cache = jax.experimental.compilation_cache.compilation_cache
    used = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", used)
    cache.reset_cache()


def taken_by_all(compiles: Callable[[], Any]) -> tuple[Any, int]:
    """What it gives, and how much all ranks together have taken from others meanwhile."""
    # A barrier that compiles nothing.
    world.gather(None, SIZE)
    before = int(world.about()["compiled_by_others"])
    result = compiles()
    own = int(world.about()["compiled_by_others"]) - before
    return result, sum(world.gather(own, SIZE))


def compiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, int]:
    """It compiled, and how many ranks have taken that from others."""
    lowered = jax.jit(function, **options).lower(*arguments)
    return taken_by_all(lowered.compile)


def test_one_rank_compiles_a_program_for_all_devices() -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    whole = np.arange(4 * SIZE, dtype=np.float32)
    x = jax.make_array_from_callback((4 * SIZE,), NamedSharding(mesh, P("x")), whole.__getitem__)

    def body(x):
        neighbour = lax.ppermute(x, "x", [(i, (i + 1) % SIZE) for i in range(SIZE)])
        return lax.psum(x * 3, "x"), neighbour + lax.axis_index("x")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=(P(), P("x")))
    program, taken = compiled(mapped, x)
    # The partitioned module, and the executable.
    assert taken == 2 * (SIZE - 1)
    total, neighbour = program(x)
    np.testing.assert_array_equal(total.addressable_data(0), 3 * whole.reshape(SIZE, 4).sum(axis=0))
    np.testing.assert_array_equal(
        neighbour.addressable_data(0), np.arange(4) + 4 * ((RANK - 1) % SIZE) + RANK
    )
    assert "all-reduce" in program.as_text()


def test_one_rank_compiles_a_program_for_one_device() -> None:
    """With operations, a library's custom call, a callback and a donated argument."""

    def step(x, y):
        x = nt.allreduce(x, m.SUM)
        root = jnp.linalg.cholesky(x @ x.T + 10 * jnp.eye(4))
        told = jax.pure_callback(lambda x: x + RANK, jax.ShapeDtypeStruct((), x.dtype), x[0, 0])
        return root, told, y + 1

    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    program, taken = compiled(step, x, jnp.zeros(1000), donate_argnums=1)
    assert taken == SIZE - 1
    y = jnp.zeros(1000)
    root, told, more = program(x + 1, y)
    total = SIZE * (x + 1)
    expected = np.linalg.cholesky(total @ total.T + 10 * np.eye(4))
    np.testing.assert_allclose(root, expected, rtol=1e-2, atol=1e-2)
    assert told == SIZE + RANK and more[0] == 1
    assert y.is_deleted()


def test_what_was_taken_says_and_gives_what_was_compiled() -> None:
    x = np.arange(6, dtype=np.float32)
    program, taken = compiled(lambda x: jnp.sin(x) @ x, x)
    assert taken == SIZE - 1
    memory = program.memory_analysis()
    said = {
        "text": program.as_text(),
        "cost": sorted((program.cost_analysis() or {}).items()),
        "memory": [memory.argument_size_in_bytes, memory.output_size_in_bytes],
    }
    first, *others = world.gather(said, SIZE)
    assert all(one == first for one in others)
    # With its machine code, whoever loads it: JAX's compilation cache writes this.
    serialized, inputs, outputs = serialize_executable.serialize(program)
    again = serialize_executable.deserialize_and_load(
        serialized, inputs, outputs, execution_devices=jax.local_devices()
    )
    np.testing.assert_array_equal(again(x), program(x))


def test_ranks_with_different_programs_compile_their_own() -> None:
    program, taken = compiled(lambda x: x * RANK + 0.25, np.float32(2))
    assert taken == 0
    assert program(np.float32(2)) == 2 * RANK + 0.25


def test_the_same_program_with_other_options_is_another() -> None:
    def function(x):
        return jnp.cos(x) + 0.5

    options = {"xla_cpu_enable_fast_math": bool(RANK % 2)}
    program, taken = compiled(function, np.float32(0), compiler_options=options)
    # Those with the same option share.
    assert taken == SIZE - 2
    assert program(np.float32(0)) == 1.5


def test_each_rank_hears_why_its_program_does_not_compile() -> None:
    shape = jax.ShapeDtypeStruct((), np.float32)
    lowered = jax.jit(lambda: jax.ffi.ffi_call("no_such_target", shape)()).lower()

    def fails() -> None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_target"):
            lowered.compile()

    assert taken_by_all(fails)[1] == 0
