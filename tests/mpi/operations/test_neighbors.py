"""Collectives between neighbours in a topology, against what the edges say."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpi_cuda as m
from mpi_cuda import notoken as nt

MPI = pytest.importorskip("mpi4py.MPI")
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
WORLD = MPI.COMM_WORLD
NODES = int(os.environ.get("MPI_CUDA_PRETEND_NODES", "1"))
NEXT, PREVIOUS = (RANK + 1) % SIZE, (RANK - 1) % SIZE


def line(periodic: bool) -> Any:
    return WORLD.Create_cart([SIZE], [periodic])


def grid() -> Any:
    """Open in one dimension, and closed in the other."""
    dims = [2, SIZE // 2] if SIZE % 2 == 0 else [1, SIZE]
    return WORLD.Create_cart(dims, [False, True])


def thin() -> Any:
    """Closed in three dimensions, in two of which each rank is its own neighbour."""
    return WORLD.Create_cart([1, SIZE, 1], [True] * 3)


def ring() -> Any:
    return WORLD.Create_dist_graph_adjacent([PREVIOUS], [NEXT])


def star() -> Any:
    """All others send to rank 0, which answers nobody."""
    others = list(range(1, SIZE))
    return WORLD.Create_dist_graph_adjacent(*((others, []) if RANK == 0 else ([], [0])))


def graph() -> Any:
    """A closed ring, whose edges go both ways."""
    edges = [sorted({(r - 1) % SIZE, (r + 1) % SIZE}) for r in range(SIZE)]
    index = np.cumsum([len(these) for these in edges]).tolist()
    return WORLD.Create_graph(index, [to for these in edges for to in these])


TOPOLOGIES = {
    "open line": lambda: line(False),
    "closed line": lambda: line(True),
    "grid": grid,
    "thin": thin,
    "ring": ring,
    "star": star,
    "graph": graph,
}


def is_there(rank: int) -> bool:
    return rank != MPI.PROC_NULL


def block(sender: int, place: int, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    return np.random.default_rng(100 * sender + place).normal(size=shape).astype(np.float32)


def places(comm: Any) -> list[int]:
    """Which of its blocks each source sends here."""
    edges = comm.allgather((comm.inedges, comm.outedges))
    found, rank = [], comm.Get_rank()
    for slot, source in enumerate(comm.inedges):
        if not is_there(source):
            found.append(-1)
        elif isinstance(comm, MPI.Cartcomm):
            # What comes from the rank before, that one has sent to the rank behind.
            found.append(slot ^ 1)
        else:
            found.append(edges[source][1].index(rank))
    return found


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology(name: str) -> None:
    comm = TOPOLOGIES[name]()
    rank, sources = comm.Get_rank(), comm.inedges
    gathered = nt.neighbor_allgather(block(rank, 0), comm=comm)
    expected = [block(s, 0) if is_there(s) else np.zeros((2, 3)) for s in sources]
    assert gathered.shape == (len(sources), 2, 3)
    np.testing.assert_array_equal(gathered, np.reshape(expected, gathered.shape))
    mine = np.reshape([block(rank, p) for p in range(len(comm.outedges))], (-1, 2, 3))
    mine = mine.astype(np.float32)
    came = jax.jit(lambda x: nt.neighbor_alltoall(x, comm=comm))(mine)
    expected = [
        block(s, p) if is_there(s) else np.zeros((2, 3))
        for s, p in zip(sources, places(comm), strict=True)
    ]
    np.testing.assert_array_equal(came, np.reshape(expected, came.shape))
    batched = jax.vmap(lambda x: nt.neighbor_alltoall(x, comm=comm), in_axes=2, out_axes=2)(mine)
    np.testing.assert_array_equal(batched, came)
    batched = jax.vmap(lambda x: nt.neighbor_allgather(x, comm=comm), out_axes=1)(block(rank, 0))
    np.testing.assert_array_equal(batched, gathered)
    comm.Free()


@pytest.mark.rule
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_transpose_is_the_adjoint(name: str) -> None:
    """The scalar products over all ranks agree, and a second derivative is symmetric."""
    comm = TOPOLOGIES[name]()
    out, into = len(comm.outedges), len(comm.inedges)
    operations = [
        (lambda x: nt.neighbor_allgather(x, comm=comm), (3,), (into, 3)),
        (lambda x: nt.neighbor_alltoall(x, comm=comm), (out, 3), (into, 3)),
    ]
    for function, shape, result_shape in operations:
        # NumPy's, since JAX would compile programs for each shape.
        numbers = np.random.default_rng(RANK)
        x, y, u, v = (
            jnp.asarray(numbers.standard_normal(s, np.float32))
            for s in (shape, result_shape, shape, shape)
        )
        result, pullback = jax.vjp(function, x)
        there, back = (np.vdot(a, b) for a, b in ((result, y), (x, pullback(y)[0])))
        there, back = (WORLD.allreduce(float(one)) for one in (there, back))
        np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-4)

        def loss(x: jax.Array, function: Any = function) -> jax.Array:
            return (function(x) ** 3).sum()

        def product(vector: jax.Array, x: jax.Array = x, loss: Any = loss) -> jax.Array:
            return jax.jvp(jax.grad(loss), (x,), (vector,))[1]

        one, other = (np.vdot(a, product(b)) for a, b in ((u, v), (v, u)))
        one, other = (WORLD.allreduce(float(x)) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    comm.Free()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "complex64", "bfloat16", "int4"])
def test_every_dtype_with_tokens_and_nothing_at_the_edge(dtype: str) -> None:
    comm = line(False)
    x = jnp.full((2, 5), 1 + comm.Get_rank() % 3).astype(dtype)
    gathered, token = m.neighbor_allgather(x[0], comm=comm, token=m.create_token())
    came, token = m.neighbor_alltoall(x, comm=comm, token=token)
    for slot, source in enumerate(comm.inedges):
        expected = jnp.full(5, 1 + source % 3 if is_there(source) else 0).astype(dtype)
        for got in (gathered, came):
            assert got.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(np.asarray(got[slot]), np.asarray(expected))
    comm.Free()


def test_long_blocks_and_empty_ones() -> None:
    comm = line(True)
    for shape in [(100_000,), (0, 4)]:
        x = jnp.full((2, *shape), comm.Get_rank(), jnp.float32)
        came = nt.neighbor_alltoall(x, comm=m.as_comm(comm))
        expected = [np.full(shape, s, np.float32) for s in comm.inedges]
        np.testing.assert_array_equal(came, np.stack(expected))
    comm.Free()


def test_what_does_not_fit_is_refused_by_name() -> None:
    comm, x = line(True), jnp.ones((3, 2))
    with pytest.raises(
        TypeError, match=r"neighbor_allgather: comm must have a topology.*Create_ca"
    ):
        nt.neighbor_allgather(x, comm=m.COMM_WORLD)
    with pytest.raises(TypeError, match="neighbor_alltoall: comm must have a topology"):
        nt.neighbor_alltoall(x, comm=WORLD)
    twice = WORLD.Create_dist_graph_adjacent([PREVIOUS, PREVIOUS], [NEXT, NEXT])
    with pytest.raises(NotImplementedError, match=rf"the graph has 2 edges from rank {PREVIOUS}, "):
        nt.neighbor_alltoall(x[:2], comm=twice)
    twice.Free()
    text = rf"neighbor_alltoall on rank {comm.Get_rank()}: x has shape \(3, 2\), .* sends to, 2"
    with pytest.raises(ValueError, match=text):
        nt.neighbor_alltoall(x, comm=comm)
    comm.Free()


def test_a_custom_call_with_other_neighbours_is_refused() -> None:
    """MPI would write where there is no room."""
    comm, x = line(True), jnp.ones(3)
    number = np.int64(m.as_comm(comm).number)

    def call(comm: np.int64, sources: int, rows: int) -> None:
        result = jax.ShapeDtypeStruct((rows, 3), x.dtype)
        # Without a side effect only the result has its error.
        function = jax.ffi.ffi_call("mpi_cuda_neighbor_allgather", result)
        both = {"sources": np.int64(sources), "destinations": np.int64(sources)}
        jax.block_until_ready(jax.jit(lambda x: function(x, comm=comm, **both))(x))

    call(number, 2, 2)
    with pytest.raises(Exception, match="does not fit 2 neighbours to receive from and 2 to send"):
        call(number, 2, 1)
    for other in (number, np.int64(2)):
        with pytest.raises(Exception, match=r"neighbor_allgather .*(?i:topology)"):
            call(other, 1, 1)
    comm.Free()


@pytest.mark.parametrize("name", ["open line", "closed line", "graph"])
def test_a_block_that_is_too_short_is_an_error_on_every_rank(name: str) -> None:
    """MPI leaves the end of the result as it was, where it says nothing. Of one element, which no
    canary would tell, and of another dtype of that size."""
    comm = TOPOLOGIES[name]()
    # Of several nodes, those of one: it differs from the others, and not within itself.
    short = RANK == 0 if NODES == 1 else RANK * NODES // SIZE == 0
    for other in jnp.ones(5), jnp.ones(6, jnp.int32):
        x = other if short else jnp.ones(6)
        blocks = jnp.broadcast_to(x, (len(comm.outedges), *x.shape))
        for call in (
            lambda x=x: nt.neighbor_allgather(x, comm=comm),
            lambda x=x: jax.jit(lambda x: nt.neighbor_allgather(x, comm=comm))(x),
            lambda blocks=blocks: nt.neighbor_alltoall(blocks, comm=comm),
        ):
            with pytest.raises(Exception, match=r"different|same shape and dtype for each neigh"):
                call().block_until_ready()
    # Those that are the same go on, and so do others.
    same = nt.neighbor_allgather(jnp.full(6, 1.0 + RANK), comm=comm)
    expected = [np.full(6, 1.0 + s if is_there(s) else 0) for s in comm.inedges]
    np.testing.assert_array_equal(same, np.stack(expected))
    np.testing.assert_array_equal(nt.allreduce(jnp.ones(2), m.SUM, comm=comm), np.full(2, SIZE))
    comm.Free()
