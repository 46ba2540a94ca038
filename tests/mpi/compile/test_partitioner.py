"""Programs whose custom calls JAX's own XLA partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
MESH = Mesh(np.array(jax.devices()), ("x",))
ROWS = NamedSharding(MESH, P("x", None))
LENGTH = 4 * SIZE
VALUES = np.arange(LENGTH * 8, dtype=np.float32).reshape(LENGTH, 8) % 11

pytestmark = pytest.mark.not_on_gpu("there the inner plugin partitions them")


def spread(values: np.ndarray, sharding: NamedSharding = ROWS) -> jax.Array:
    shape, dtype = values.shape, values.dtype
    return jax.make_array_from_callback(shape, sharding, values.__getitem__, dtype=dtype)


def local(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_data(0))


class Partitioned:
    """A function of rows of which JAX does not know that they are independent; its rule does.

    `by` is what each device runs on its rows, `seen` the shardings that the rule was asked about.
    """

    def __init__(self, whole: Callable[..., Any], by: Callable[..., Any] | None = None) -> None:
        self.seen: list[P] = []
        self.call = custom_partitioning(whole)

        def infer(mesh: Any, arguments: Any, result: Any) -> NamedSharding:
            return NamedSharding(mesh, P(arguments[0].sharding.spec[0], None))

        def partition(mesh: Any, arguments: Any, result: Any) -> Any:
            self.seen.append(arguments[0].sharding.spec)
            rows = infer(mesh, arguments, result)
            return mesh, by or whole, rows, (rows,)

        self.call.def_partition(
            infer_sharding_from_operands=infer, partition=partition, sharding_rule="i j -> i k"
        )


def transformed(x: jax.Array) -> jax.Array:
    return jnp.abs(jnp.fft.fft(x)).astype(np.float32)


WANTED = np.abs(np.fft.fft(VALUES)).astype(np.float32)


@pytest.mark.parametrize("shardy", [True, False])
def test_custom_partitioning_runs_its_rule(shardy: bool) -> None:
    partitioned = Partitioned(transformed)
    jax.config.update("jax_use_shardy_partitioner", shardy)
    try:
        compiled = jax.jit(partitioned.call).lower(spread(VALUES)).compile()
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert partitioned.seen and all(spec[0] == "x" for spec in partitioned.seen)
    # Every device has its rows already.
    assert "all-gather" not in compiled.as_text()
    result = compiled(spread(VALUES))
    assert result.sharding.is_equivalent_to(ROWS, 2)
    np.testing.assert_allclose(local(result), WANTED[4 * RANK : 4 * RANK + 4], rtol=1e-4)


def test_operands_are_brought_to_where_the_rule_wants_them() -> None:
    """From columns, in a loop whose length XLA knows and one whose it does not, and back."""
    columns = NamedSharding(MESH, P(None, "x"))
    partitioned = Partitioned(lambda x: jnp.cumsum(x, axis=1))
    values = np.arange(LENGTH * SIZE * 2, dtype=np.float32).reshape(LENGTH, -1) % 3

    def program(x: jax.Array, times: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 2, lambda _, x: partitioned.call(x) % 5, x)
        x = lax.while_loop(
            lambda c: c[0] < times, lambda c: (c[0] + 1, partitioned.call(c[1]) % 5), (0, x)
        )[1]
        return x @ x.T

    want = values
    for _ in range(5):
        want = np.cumsum(want, axis=1) % 5
    run = jax.jit(program, out_shardings=NamedSharding(MESH, P(None, "x")))
    result = run(spread(values, columns), jnp.int32(3))
    np.testing.assert_array_equal(local(result), (want @ want.T)[:, 4 * RANK : 4 * RANK + 4])


def test_collectives_of_the_rule_and_operations_beside_it() -> None:
    partitioned = Partitioned(
        lambda x: x - x.mean(), lambda x: x - lax.pmean(x.mean(), "x").astype(x.dtype)
    )

    def program(x: jax.Array) -> Any:
        y = partitioned.call(x)
        mapped = jax.shard_map(
            lambda x: nt.allreduce(x.max()[None], op=m.MAX), mesh=MESH, in_specs=P("x"),
            out_specs=P("x"), check_vma=False,
        )  # fmt: skip
        return y, mapped(x), jax.grad(lambda x: (x**2).sum())(y)

    y, largest, gradient = jax.jit(program)(spread(VALUES))
    want = VALUES - VALUES.mean()
    own = slice(4 * RANK, 4 * RANK + 4)
    np.testing.assert_allclose(local(y), want[own], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(local(gradient), 2 * want[own], rtol=1e-5, atol=1e-5)
    assert local(largest) == VALUES.max()


def test_what_is_donated_stays_in_place() -> None:
    partitioned = Partitioned(lambda x: x[:, ::-1] + 1)
    run = jax.jit(partitioned.call, donate_argnums=0)
    compiled = run.lower(spread(VALUES)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 4 * VALUES[:4].size
    x = spread(VALUES)
    result = compiled(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(local(result), VALUES[4 * RANK : 4 * RANK + 4, ::-1] + 1)


def test_a_mesh_of_some_ranks() -> None:
    some = Mesh(np.array(jax.devices()[-2:]), ("x",))
    partitioned = Partitioned(transformed)
    result = jax.jit(partitioned.call)(spread(VALUES, NamedSharding(some, P("x", None))))
    for shard in result.addressable_shards:
        np.testing.assert_allclose(shard.data, WANTED[shard.index], rtol=1e-4)
    assert len(result.addressable_shards) == (RANK >= SIZE - 2)


def test_shardings_are_inspected() -> None:
    seen: list[Any] = []

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        y = x * 2
        jax.debug.inspect_array_sharding(y, callback=seen.append)
        return y.sum()

    assert program(spread(VALUES)) == 2 * VALUES.sum()
    (sharding,) = seen
    assert sharding.is_equivalent_to(ROWS, 2)


def test_a_batch_of_matrices_stays_where_it_is() -> None:
    """JAX's custom calls for LAPACK are registered as batch partitionable."""
    matrices = VALUES[:, :, None] * VALUES[:, None, :] + 50 * np.eye(8, dtype=np.float32)
    batch = NamedSharding(MESH, P("x", None, None))
    compiled = jax.jit(jnp.linalg.cholesky).lower(spread(matrices, batch)).compile()
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()
    want = np.linalg.cholesky(matrices)[4 * RANK : 4 * RANK + 4]
    np.testing.assert_allclose(local(compiled(spread(matrices, batch))), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", ["", "cse,dot-library-rewriter"])
def test_products_beside_it_are_those_of_any_plugin(passes: str) -> None:
    """jaxlib's XLA must not leave them to a library that the inner plugin lacks."""
    batch = VALUES[:, :, None] * VALUES[:, None, :] + 50 * np.eye(8, dtype=np.float32)
    matrices = spread(batch, NamedSharding(MESH, P("x", None, None)))

    def program(matrices: jax.Array, x: jax.Array) -> Any:
        half = x.astype(jnp.bfloat16)
        wide = jnp.matmul(half, jnp.ones((8, 128), jnp.bfloat16), preferred_element_type="float32")
        return jnp.linalg.cholesky(matrices), wide, x @ jnp.ones((8, 64))

    options = {"xla_disable_hlo_passes": passes} if passes else None
    compiled = jax.jit(program).lower(matrices, spread(VALUES)).compile(options)
    root, *products = compiled(matrices, spread(VALUES))
    own = slice(4 * RANK, 4 * RANK + 4)
    np.testing.assert_allclose(local(root), np.linalg.cholesky(batch)[own], rtol=1e-4, atol=1e-4)
    for product in products:
        want = np.repeat(VALUES[own].sum(1, keepdims=True), product.shape[1], axis=1)
        np.testing.assert_allclose(local(product), want, rtol=1e-2)


RULES: dict[str, tuple[Callable[..., Any], str]] = {
    "operation": (lambda x: nt.allreduce(x, op=m.SUM), "an operation of mpi_cuda stands in"),
    "callback": (lambda x: jax.debug.print("{}", x) or x, "a callback .*stands in the partition"),
    "pure": (lambda x: jax.pure_callback(np.sin, x, x), "a callback .*stands in the partition"),
    "shape": (lambda x: x[:1], "Mismatch in result shapes"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_cannot_be_is_refused(rule: str) -> None:
    by, words = RULES[rule]
    partitioned = Partitioned(lambda x: x, by)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"CustomSPMDPartitioning(.|\n)*{words}"):
        jax.jit(partitioned.call)(spread(VALUES))
    # The next program runs.
    test_shardings_are_inspected()
