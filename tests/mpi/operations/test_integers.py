"""Reductions of integers are those of numpy, also where they overflow, for every element."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
OPS = {"SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
DTYPES = [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")]
# Vectors of processors take some elements at once; those that are left go other ways.
LENGTHS = [67, 4099]


def everyone(dtype: str, length: int) -> np.ndarray:
    """A row for each rank, of numbers whose sums and products overflow."""
    info = np.iinfo(dtype)
    random = np.random.default_rng(length)
    rows = random.integers(info.min, info.max, (SIZE, length), dtype, endpoint=True)
    rows[:, ::3], rows[:, 1::7] = info.max, info.min
    return rows


def reduced(op: str, rows: np.ndarray) -> np.ndarray:
    return functools.reduce(OPS[op], rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_that_overflow(dtype: str, length: int) -> None:
    with jax.enable_x64(True):
        rows, root = everyone(dtype, length), SIZE - 1

        @jax.jit
        def program(x: jax.Array) -> dict[str, list[jax.Array]]:
            def results(op: str) -> list[jax.Array]:
                reduction = getattr(m, op)
                scans = [nt.scan(x, reduction), nt.exscan(x, reduction)]
                blocks = nt.reduce_scatter(jnp.stack([x] * SIZE), reduction)
                return [nt.allreduce(x, reduction), nt.reduce(x, reduction, root), blocks, *scans]

            return {op: results(op) for op in OPS}

        for op, results in program(jnp.asarray(rows[RANK])).items():
            everything = reduced(op, rows)
            want = [everything, everything if RANK == root else rows[RANK], everything]
            want.append(reduced(op, rows[: RANK + 1]))
            if RANK > 0:
                want.append(reduced(op, rows[:RANK]))
            for result, right in zip(results, want, strict=False):
                assert result.dtype == right.dtype
                np.testing.assert_array_equal(result, right, op)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replicated_sums_that_overflow(dtype: str) -> None:
    with jax.enable_x64(True):
        mesh = Mesh(np.array(jax.devices()), "x")
        for length in LENGTHS:
            rows = everyone(dtype, length)
            x = jax.make_array_from_callback(
                rows.shape, NamedSharding(mesh, P("x")), lambda index, rows=rows: rows[index]
            )
            program = jax.shard_map(
                lambda x: (lax.psum(x, "x"), lax.pmax(x, "x"), lax.pmin(x, "x")),
                mesh=mesh,
                in_specs=P("x"),
                out_specs=P(),
            )
            results = jax.jit(program)(x)
            for op, result in zip(("SUM", "MAX", "MIN"), results, strict=True):
                np.testing.assert_array_equal(np.asarray(result)[0], reduced(op, rows), op)
