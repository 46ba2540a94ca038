"""Programs compiled ahead of time: shardings, analyses, serialization, layouts."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import (
    COLUMNS,
    MESH,
    RANK,
    ROWS,
    SIZE,
    D,
    check,
    numbers,
    put,
    simulated,
)
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def test_ahead_of_time() -> None:
    x, y = numbers((D, D)), numbers((D, D), seed=1)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, spec))
        for spec in (ROWS, COLUMNS)
    ]
    lowered = jax.jit(
        lambda x, y: (x @ y, x.sum()), out_shardings=(NamedSharding(MESH, COLUMNS), None)
    ).lower(*shapes)
    assert "stablehlo" in lowered.as_text() or "func.func" in lowered.as_text()
    compiled = lowered.compile()
    check(compiled(put(x, ROWS), put(y, COLUMNS)), (x @ y, x.sum()))
    (a, b), _ = compiled.input_shardings
    assert a.is_equivalent_to(NamedSharding(MESH, ROWS), 2)
    assert b.is_equivalent_to(NamedSharding(MESH, COLUMNS), 2)
    assert compiled.output_shardings[0].is_equivalent_to(NamedSharding(MESH, COLUMNS), 2)
    assert compiled.output_shardings[1].is_fully_replicated
    with pytest.raises((ValueError, TypeError)):
        compiled(put(x, COLUMNS), put(y, COLUMNS))


def test_ahead_of_time_analyses() -> None:
    x = jax.ShapeDtypeStruct((D, D), np.float32, sharding=NamedSharding(MESH, ROWS))
    out = NamedSharding(MESH, P())
    compiled = jax.jit(lambda x: jnp.sin(x).sum(0), out_shardings=out).lower(x).compile()
    text = compiled.as_text()
    assert "HloModule" in text
    if SIZE > 1:
        assert re.search(r"all-reduce|all-gather", text)
    analysis = compiled.cost_analysis()
    assert analysis is not None
    assert analysis["flops"] > 0
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == D * D * 4 // SIZE
    assert memory.output_size_in_bytes == D * 4
    assert compiled.runtime_executable() is not None


def test_compiled_by_one_rank_alone() -> None:
    """Compiling needs no other rank."""
    if RANK == SIZE - 1:
        x = jax.ShapeDtypeStruct((D, 5), np.float32, sharding=NamedSharding(MESH, ROWS))
        jax.jit(lambda x: x - x.sum(0)).lower(x).compile()


def test_serialized_executable() -> None:
    x = numbers((D, 3))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, ROWS))
    compiled = jax.jit(lambda x: x - x.sum(0)).lower(shape).compile()
    loaded = deserialize_and_load(*serialize(compiled))
    check(loaded(put(x)), x - x.sum(0))


def test_layouts_of_arguments_and_results() -> None:
    """Columns before rows in memory, so parts of the gathered axis lie together."""
    x, column_major = numbers((D, 4)), Format(Layout((1, 0)), NamedSharding(MESH, ROWS))

    def f(x):
        wide = jnp.tile(x, (1, SIZE))
        return (
            lax.all_gather(x, "x", axis=1, tiled=True),
            lax.psum_scatter(wide, "x", scatter_dimension=1, tiled=True),
            lax.all_to_all(wide, "x", 1, 0, tiled=True),
        )

    shaped = jax.shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x"))
    options = {"in_shardings": column_major, "out_shardings": column_major}
    got = jax.jit(shaped, **options)(jax.device_put(put(x), column_major))
    assert all(y.format.layout.major_to_minor == (1, 0) for y in got)
    check(got, simulated(f, x))


def test_layouts_ahead_of_time() -> None:
    x = jax.ShapeDtypeStruct((D, D), np.float32, sharding=NamedSharding(MESH, ROWS))
    compiled = jax.jit(lambda x: x.T @ x).lower(x).compile()
    assert compiled.input_formats[0][0].layout is not None
    assert compiled.output_formats.layout is not None


def test_compiled_once() -> None:
    calls = 0

    @jax.jit
    def f(x):
        nonlocal calls
        calls += 1
        return x - x.mean(0)

    x = numbers((D, D))
    for _ in range(3):
        check(f(put(x)), x - x.mean(0), 1e-6)
    assert calls == 1
    check(f(put(x, COLUMNS)), x - x.mean(0), 1e-6)
