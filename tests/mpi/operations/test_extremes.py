"""MIN and MAX of real numbers: all ranks have the same bits, ordered by value and then sign."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def everyone(dtype: np.dtype) -> np.ndarray:
    """A row of bits for each rank: zeros of both signs, denormals, infinities, NaN, and others."""
    kind = UNSIGNED[dtype.itemsize]
    sign = kind(1 << (8 * dtype.itemsize - 1))
    infinity = np.array(np.inf, dtype).view(kind)[()]
    special = np.array([0, 1, 2, infinity - 1, infinity, infinity + 1, sign - 1], kind)
    special = np.concatenate([special, special | sign])
    random = np.random.default_rng(dtype.itemsize)
    chosen = random.choice(special, (SIZE, 600))
    anything = random.integers(0, np.iinfo(kind).max, (SIZE, 600), kind, endpoint=True)
    return np.concatenate([chosen, anything], 1)


def extremum(rows: np.ndarray, dtype: np.dtype, largest: bool) -> np.ndarray:
    """The bits that are right, by comparing them as integers."""
    signed = np.dtype(f"i{dtype.itemsize}")
    bits = rows.view(signed)
    keys = bits ^ ((bits >> (8 * dtype.itemsize - 1)) & np.iinfo(signed).max)
    key = keys.max(0) if largest else keys.min(0)
    chosen = (key ^ ((key >> (8 * dtype.itemsize - 1)) & np.iinfo(signed).max)).view(rows.dtype)
    nan = np.isnan(rows.view(dtype)).any(0)
    return np.where(nan, np.array(np.nan, dtype).view(rows.dtype), chosen)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(UNSIGNED[x.dtype.itemsize])


@pytest.mark.parametrize("op", ["MIN", "MAX"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_the_same_bits_on_every_rank(name: str, op: str) -> None:
    with jax.enable_x64(True):
        dtype = jnp.dtype(name)
        rows, reduction = everyone(dtype), getattr(m, op)
        want = extremum(rows, dtype, op == "MAX")
        mine = jnp.asarray(rows[RANK].view(dtype))
        if SIZE == 1:
            return
        np.testing.assert_array_equal(bits(nt.allreduce(mine, reduction)), want)
        root = SIZE - 1
        if RANK == root:
            np.testing.assert_array_equal(bits(nt.reduce(mine, reduction, root)), want)
            np.testing.assert_array_equal(bits(nt.scan(mine, reduction)), want)
        else:
            nt.reduce(mine, reduction, root)
            nt.scan(mine, reduction)
        parts = jnp.stack([mine] * SIZE)
        np.testing.assert_array_equal(bits(nt.reduce_scatter(parts, reduction)), want)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_replicated_extremum_is_the_same_everywhere(name: str) -> None:
    """XLA takes denormals for zero, so only what MPI chose is compared, not what it is."""
    with jax.enable_x64(True):
        dtype = jnp.dtype(name)
        rows = everyone(dtype).view(dtype)
        mesh = Mesh(np.array(jax.devices()), "x")
        x = jax.make_array_from_callback(
            rows.shape, NamedSharding(mesh, P("x")), lambda index: rows[index]
        )
        program = jax.shard_map(
            lambda x: (lax.pmax(x, "x"), lax.pmin(x, "x")),
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P(),
        )
        for result in jax.jit(program)(x):
            own = np.asarray(result).tobytes()
            assert MPI.COMM_WORLD.allgather(own) == [own] * SIZE
