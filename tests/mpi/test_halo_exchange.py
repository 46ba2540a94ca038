"""The exchange of ghost cells against a map of who owns which cell, made without messages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from mpi4py import MPI

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
GRIDS = [
    grid
    for count in (1, 2, 3)
    for grid in itertools.product(range(1, SIZE + 1), repeat=count)
    # Compiling takes all the time: of those with three dimensions not the ones that are lines.
    if math.prod(grid) == SIZE and (count < 3 or SIZE < 4 or max(grid) < SIZE)
]
# For each dimension of the largest grid; a smaller one takes the first ones.
WIDTHS = [(1, 1, 1), (2, 1, 3), ((1, 2), (0, 1), (2, 0)), ((3, 0), (1, 1), (0, 0))]
# As many dimensions with neighbours as there can be.
GRID = max(GRIDS, key=lambda grid: sum(n > 1 for n in grid))
AROUND = (True,) * len(GRID)
Pair = tuple[int, int]


def pairs(width: Any, count: int) -> list[Pair]:
    return [(w, w) if isinstance(w, int) else w for w in width[:count]]


class Reference:
    """Which rank owns each cell of each rank's array, worked out for each dimension alone."""

    def __init__(self, grid: tuple[int, ...], width: Any, periodic: tuple[bool, ...]):
        self.grid, self.widths, self.periodic = grid, pairs(width, len(grid)), periodic

    def interior(self, dimension: int, place: int) -> int:
        """Cells of a rank's own. Neighbours differ, and the smallest is as wide as the width."""
        return max(max(self.widths[dimension]), 1) + place % 2

    def shape(self, rank: int) -> tuple[int, ...]:
        places = np.unravel_index(rank, self.grid)
        return tuple(
            self.interior(d, int(place)) + sum(self.widths[d]) for d, place in enumerate(places)
        )

    def owner(self, dimension: int, place: int, index: int) -> Pair:
        """The place that owns a cell, and its index there."""
        low, _ = self.widths[dimension]
        sizes = [self.interior(dimension, one) for one in range(self.grid[dimension])]
        cell = sum(sizes[:place]) + index - low
        if not 0 <= cell < sum(sizes):
            if not self.periodic[dimension]:
                # Beyond the end: the cells of the rank that is there.
                place = 0 if cell < 0 else len(sizes) - 1
                return place, cell - sum(sizes[:place]) + low
            cell %= sum(sizes)
        place = int(np.searchsorted(np.cumsum(sizes), cell, side="right"))
        return place, cell - sum(sizes[:place]) + low

    def cells(self, rank: int) -> Iterator[tuple[tuple[int, ...], int, tuple[int, ...]]]:
        """Each cell of a rank's array, the rank that owns it, and where that has it."""
        places = [int(place) for place in np.unravel_index(rank, self.grid)]
        for index in np.ndindex(self.shape(rank)):
            owners = [self.owner(d, places[d], index[d]) for d in range(len(index))]
            whose = int(np.ravel_multi_index([place for place, _ in owners], self.grid))
            yield index, whose, tuple(where for _, where in owners)

    def filled(self, arrays: list[np.ndarray], rank: int = RANK) -> np.ndarray:
        """The array of a rank with its ghost cells; `arrays` are those of all ranks."""
        result = np.empty_like(arrays[rank])
        for index, whose, where in self.cells(rank):
            result[index] = arrays[whose][where]
        return result

    def transposed(self, cotangents: list[np.ndarray]) -> np.ndarray:
        """What comes back to this rank: each cell's cotangents, wherever it was copied to."""
        result = np.zeros_like(cotangents[RANK])
        for rank in range(SIZE):
            for index, whose, where in self.cells(rank):
                if whose == RANK:
                    result[where] += cotangents[rank][index]
        return result


def everyone(reference: Reference, seed: int = 0, dtype: Any = np.float32) -> list[np.ndarray]:
    return [
        np.random.default_rng([seed, rank]).integers(-50, 50, reference.shape(rank)).astype(dtype)
        for rank in range(SIZE)
    ]


def cases(grid: tuple[int, ...], number: int) -> list[tuple[Reference, dict[str, Any]]]:
    """With one of the widths: some dimensions periodic, and the others."""
    width, found = WIDTHS[number], []
    chosen = [bool(number >> dimension & 1) for dimension in range(len(grid))]
    for periodic in (tuple(chosen), tuple(not one for one in chosen)):
        options = {"grid": grid, "width": width[: len(grid)], "periodic": periodic}
        found.append((Reference(grid, width, periodic), options))
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cells_come_from_their_owner_and_cotangents_go_to_it(grid: tuple[int, ...]) -> None:
    found = [case for number in range(len(WIDTHS)) for case in cases(grid, number)]
    arrays = [everyone(reference) for reference, _ in found]
    cotangents = [everyone(reference, 1) for reference, _ in found]

    @jax.jit
    def program(mine: list[jax.Array], cts: list[jax.Array]) -> Any:
        def exchanged(xs: list[jax.Array]) -> list[jax.Array]:
            return [nt.halo_exchange(x, **how) for x, (_, how) in zip(xs, found, strict=True)]

        results, pull = jax.vjp(exchanged, mine)
        return results, pull(cts)[0]

    results = program([every[RANK] for every in arrays], [every[RANK] for every in cotangents])
    for (reference, _), every, cts, filled, back in zip(
        found, arrays, cotangents, *results, strict=True
    ):
        np.testing.assert_array_equal(filled, reference.filled(every))
        np.testing.assert_array_equal(back, reference.transposed(cts))


@pytest.mark.parametrize("number", range(len(WIDTHS)))
def test_outside_of_programs(number: int) -> None:
    for reference, how in cases(GRID, number):
        every, cts = everyone(reference), everyone(reference, 1)
        got, token = m.halo_exchange(every[RANK], **how)
        np.testing.assert_array_equal(got, reference.filled(every))
        assert token.shape == ()
        got, pull = jax.vjp(partial(nt.halo_exchange, **how), every[RANK])
        np.testing.assert_array_equal(got, reference.filled(every))
        np.testing.assert_array_equal(pull(cts[RANK])[0], reference.transposed(cts))


@pytest.mark.parametrize("periodic", [False, True])
def test_a_loss_without_ghost_cells_on_one_rank(periodic: bool) -> None:
    """What a rank's loss does not depend on is sent back all the same."""
    x = jnp.arange(5.0)

    def loss(x: jax.Array) -> jax.Array:
        y = nt.halo_exchange(x, periodic=periodic)
        return (y if RANK else y[1:-1]).sum()

    reference = Reference((SIZE,), (1,), (periodic,))
    reference.interior = lambda dimension, place: 3  # type: ignore[method-assign]
    cts = [np.ones(5, np.float32) for _ in range(SIZE)]
    cts[0][[0, -1]] = 0
    np.testing.assert_array_equal(jax.grad(loss)(x), reference.transposed(cts))
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), reference.transposed(cts))


def messages(function: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("mpi_cuda_sendrecv")


def test_a_tree_of_arrays_is_one_message_for_each_direction() -> None:
    reference = Reference(GRID, WIDTHS[1], AROUND)
    how = {"grid": GRID, "width": WIDTHS[1][: len(GRID)], "periodic": AROUND}
    kinds = {"f": np.float32, "i": np.int32, "b": bool, "c": np.complex64, "h": np.float16}
    every = {name: everyone(reference, 3, kind) for name, kind in kinds.items()}
    tall = [np.stack([x, 2 * x], -1) for x in everyone(reference, 4)]
    tree = {name: arrays[RANK] for name, arrays in every.items()}
    tree |= {"small": jnp.asarray(tree["i"], jnp.int4), "none": None, "tall": (tall[RANK],)}
    got, token = jax.jit(partial(m.halo_exchange, **how))(tree, token=m.create_token())
    assert jax.tree.structure(got) == jax.tree.structure(tree) and token.dtype == np.int32
    for name, arrays in every.items():
        assert got[name].dtype == kinds[name]
        np.testing.assert_array_equal(got[name], reference.filled(arrays))
    small = [np.asarray(jnp.asarray(x, jnp.int4)).astype(int) for x in every["i"]]
    np.testing.assert_array_equal(np.asarray(got["small"]).astype(int), reference.filled(small))
    for layer in (0, 1):
        expected = reference.filled([x[..., layer] for x in tall])
        np.testing.assert_array_equal(got["tall"][0][..., layer], expected)

    one = sum({1: 0, 2: 1}.get(n, 2) for n in GRID)
    assert messages(partial(nt.halo_exchange, **how), tree["f"]) == one
    many = [tree["f"], tall[RANK], *(tree["f"] for _ in range(8))]
    assert messages(partial(nt.halo_exchange, **how), many) == one
    assert messages(partial(nt.halo_exchange, **how), [*many, tree["i"], tree["i"]]) == 2 * one
    assert messages(partial(nt.halo_exchange, **how | {"width": 0}), many) == 0
    assert nt.halo_exchange([], **how) == []


def test_other_axes_of_the_arrays() -> None:
    every = [np.random.default_rng(rank).normal(size=(4, 2, 5)) for rank in range(SIZE)]
    every = [x.astype(np.float32) for x in every]
    got = nt.halo_exchange(every[RANK], (1, SIZE), axes=(0, -1), width=(0, 1), periodic=True)
    expected = every[RANK].copy()
    expected[..., 0] = every[(RANK - 1) % SIZE][..., -2]
    expected[..., -1] = every[(RANK + 1) % SIZE][..., 1]
    np.testing.assert_array_equal(got, expected)
    # The same axis counted from the front, and in one call with an array of fewer axes.
    both = nt.halo_exchange([every[RANK], every[RANK][0]], axes=-1, periodic=True)
    np.testing.assert_array_equal(both[0], expected)
    np.testing.assert_array_equal(both[1], expected[0])
    np.testing.assert_array_equal(nt.halo_exchange(every[RANK], SIZE, axes=2, periodic=1), expected)
    empty = np.zeros((0, 3), np.float32)
    assert nt.halo_exchange(empty, axes=[1], periodic=True).shape == (0, 3)


@pytest.mark.rule
def test_batches_are_one_message() -> None:
    reference, how = cases(GRID, 2)[1]
    every = [everyone(reference, seed) for seed in range(6)]
    mine = np.stack([arrays[RANK] for arrays in every])
    expected = np.stack([reference.filled(arrays) for arrays in every])
    exchange = partial(nt.halo_exchange, **how)
    np.testing.assert_array_equal(jax.vmap(exchange)(mine), expected)
    last = jax.jit(jax.vmap(exchange, in_axes=-1, out_axes=1))(np.moveaxis(mine, 0, -1))
    np.testing.assert_array_equal(np.moveaxis(last, 1, 0), expected)
    nested = jax.vmap(jax.vmap(exchange))(mine.reshape(2, 3, *mine.shape[1:]))
    np.testing.assert_array_equal(nested.reshape(mine.shape), expected)
    assert messages(jax.vmap(exchange), mine) == messages(exchange, mine[0])
    # Beside an array that is not batched.
    both = jax.vmap(lambda x: exchange([x, mine[0]]))(mine)
    np.testing.assert_array_equal(both[0], expected)
    np.testing.assert_array_equal(both[1], np.stack([expected[0]] * 6))
    cts = [everyone(reference, 10 + seed) for seed in range(6)]
    pull = jax.vmap(lambda x, ct: jax.vjp(exchange, x)[1](ct)[0])
    back = pull(mine, np.stack([arrays[RANK] for arrays in cts]))
    np.testing.assert_array_equal(back, np.stack([reference.transposed(one) for one in cts]))


@pytest.mark.rule
@pytest.mark.parametrize("periodic", [False, True])
def test_tangents_and_second_derivatives(periodic: bool) -> None:
    reference = Reference((SIZE,), (1,), (periodic,))
    x, v = (jnp.asarray(everyone(reference, seed)[RANK]) / 50 for seed in (1, 2))
    mask = jnp.arange(x.size)

    def loss(x: jax.Array) -> jax.Array:
        # Integers in the same call have no derivatives.
        y, _ = nt.halo_exchange((x, mask), periodic=periodic)
        return (y**3).sum()

    out, tangent = jax.jvp(partial(nt.halo_exchange, periodic=periodic), (x,), (v,))
    np.testing.assert_array_equal(out, nt.halo_exchange(x, periodic=periodic))
    np.testing.assert_array_equal(tangent, nt.halo_exchange(v, periodic=periodic))
    gradient = jax.grad(loss)(x)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(x), gradient, rtol=1e-5)
    _, product = jax.jvp(jax.grad(loss), (x,), (v,))
    y, dy = (np.asarray(nt.halo_exchange(one, periodic=periodic)) for one in (x, v))
    cts = MPI.COMM_WORLD.allgather(6 * y * dy)
    np.testing.assert_allclose(product, reference.transposed(cts), rtol=1e-4, atol=1e-5)


def step(u: jax.Array) -> jax.Array:
    """A step of diffusion and advection, of an array with ghost cells."""
    centre = u[1:-1, 1:-1]
    spread = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * centre
    # The corners take part.
    return centre + 0.1 * spread - 0.2 * (centre - u[:-2, :-2]) * centre


@pytest.mark.parametrize("style", ["tokens", "no tokens"])
def test_a_solver_and_its_gradient_equal_those_of_the_undivided_array(style: str) -> None:
    rows = max(n for n in range(1, SIZE + 1) if SIZE % n == 0 and n * n <= SIZE)
    grid = (rows, SIZE // rows)
    own, whole = (4, 3), (4 * grid[0], 3 * grid[1])
    place = np.unravel_index(RANK, grid)
    part = tuple(slice(p * n, (p + 1) * n) for p, n in zip(place, own, strict=True))
    start = np.random.default_rng(7).normal(size=whole).astype(np.float32)

    def alone(u: jax.Array) -> jax.Array:
        # Periodic along the first axis, zeros beyond the ends of the second one.
        def body(_: int, u: jax.Array) -> jax.Array:
            return step(jnp.pad(jnp.pad(u, ((1, 1), (0, 0)), mode="wrap"), ((0, 0), (1, 1))))

        return jax.lax.fori_loop(0, 5, body, u)

    def divided(u: jax.Array) -> jax.Array:
        how = {"grid": grid, "periodic": (True, False)}

        def body(_: int, carry: Any) -> Any:
            u, token = carry
            padded = jnp.pad(u, 1)
            if style == "no tokens":
                return step(nt.halo_exchange(padded, **how)), token
            padded, token = m.halo_exchange(padded, **how, token=token)
            return step(padded), token

        return jax.lax.fori_loop(0, 5, body, (u, m.create_token()))[0]

    np.testing.assert_allclose(
        jax.jit(divided)(start[part]), alone(start)[part], rtol=1e-5, atol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda u: (divided(u) ** 2).sum()))(start[part])
    expected = jax.grad(lambda u: (alone(u) ** 2).sum())(start)[part]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_grid_of_a_cartesian_communicator() -> None:
    dims = MPI.Compute_dims(SIZE, 2)
    cart = MPI.COMM_WORLD.Create_cart(dims, periods=[True, False], reorder=True)
    x = jnp.full((3, 3), float(cart.rank))
    got = np.asarray(nt.halo_exchange(x, comm=cart))
    for axis, sides in enumerate(((got[0, 1], got[2, 1]), (got[1, 0], got[1, 2]))):
        for peer, side in zip(cart.Shift(axis, 1), sides, strict=True):
            assert side == (cart.rank if peer == MPI.PROC_NULL else peer)
    np.testing.assert_array_equal(got, nt.halo_exchange(x, dims, comm=cart))
    shut = nt.halo_exchange(x, comm=cart, periodic=False)
    above = cart.Get_cart_rank([cart.coords[0] - 1, cart.coords[1]]) if cart.coords[0] else RANK
    assert shut[0, 1] == (above if cart.coords[0] else cart.rank)
    with pytest.raises(ValueError, match=r"that of the Cartesian communicator \(.*leave grid out"):
        nt.halo_exchange(x, (SIZE, 1, 1), comm=cart)
    jax.effects_barrier()
    cart.Free()


def test_rows_of_a_grid_as_communicators() -> None:
    half = MPI.COMM_WORLD.Split(RANK % 2)
    members = list(range(RANK % 2, SIZE, 2))
    x = jnp.full(3, float(RANK))
    got = nt.halo_exchange(x, periodic=True, comm=half)
    left, right = (members[(half.rank + step) % len(members)] for step in (-1, 1))
    assert got.tolist() == [left, RANK, right]
    jax.effects_barrier()
    half.Free()


def test_in_shard_map() -> None:
    """A global array of interiors, one part a device; the ghost cells live inside."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    whole = np.arange(4.0 * SIZE, dtype=np.float32)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def smooth(x: jax.Array) -> jax.Array:
        u = nt.halo_exchange(jnp.pad(x, 1), periodic=True)
        return u[:-2] + u[1:-1] + 2 * u[2:]

    x = jax.make_array_from_callback(
        whole.shape, jax.sharding.NamedSharding(mesh, P("x")), whole.__getitem__
    )
    expected = np.roll(whole, 1) + whole + 2 * np.roll(whole, -1)
    for shard in smooth(x).addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def test_messages_of_the_program_are_left_alone() -> None:
    following, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    coming = nt.irecv(jnp.zeros(1), before, tag=0)
    x = nt.halo_exchange(jnp.full(3, float(RANK)), periodic=True)
    nt.wait(nt.isend(jnp.full(1, 100.0 + RANK), following, tag=0))
    assert x.tolist() == [before, RANK, following]
    assert nt.wait(coming).tolist() == [100 + before]


def test_wrong_arguments() -> None:
    x = jnp.zeros((6, 6))
    here = f"halo_exchange on rank {RANK}: "
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, rf"{here}grid \({SIZE + 1},\) has {SIZE + 1} places", {"grid": [SIZE + 1]}),
        (ValueError, r"grid \(0, 5\) has 0 places, and the communicator", {"grid": (0, 5)}),
        (ValueError, "grid .* the product of grid must be", {"grid": (-1, -SIZE)}),
        (TypeError, "an entry of grid must be an integer", {"grid": (1.5,)}),
        (ValueError, rf"{here}array 0, float32\[6, 6\], has no axis 2", {"axes": [2]}),
        (ValueError, "no axis -3", {"axes": [-3]}),
        (ValueError, "divided twice along axis -2", {"grid": (1, SIZE), "axes": (0, -2)}),
        (ValueError, "axes .* has 1 entries, and the grid", {"grid": (1, SIZE), "axes": (0,)}),
        (TypeError, "axes must be a sequence", {"grid": (1, SIZE), "axes": 0}),
        (ValueError, r"width \(1, 2\) has 2 entries, and the grid", {"width": (1, 2)}),
        (ValueError, r"entry of width is \(1, 2, 3\): pass", {"width": [(1, 2, 3)]}),
        (ValueError, "width -1 is negative", {"width": -1}),
        (TypeError, "an entry of width must be an integer", {"width": 1.5}),
        (
            ValueError,
            "has 6 cells along axis 0, of which 2 and 3 are ghost cells: its own 1 cells must",
            {"width": [(2, 3)], "periodic": True},
        ),
        (ValueError, "periodic .* has 3 entries", {"periodic": (True, True, True)}),
        (TypeError, "comm must be", {"comm": "world"}),
    ]
    for kind, words, options in wrong:
        with pytest.raises(kind, match=words):
            nt.halo_exchange(x, **options)
    with pytest.raises(ValueError, match=r"array 1, float32\[\], has no axis 0"):
        m.halo_exchange([x, 1.0])
    with pytest.raises(TypeError, match="key_data"):
        nt.halo_exchange(jax.random.split(jax.random.key(0), 4))
    with pytest.raises(RuntimeError, match="takes no token"):
        nt.halo_exchange(x, token=m.create_token())
    with pytest.raises(TypeError, match="token must be"):
        m.halo_exchange(x, token=jnp.zeros(2))
    with pytest.raises(TypeError, match="static_argnums"):
        jax.jit(lambda x, n: nt.halo_exchange(x, width=n))(x, 1)


@pytest.mark.skipif(SIZE != 2, reason="both ranks of two must see it")
def test_neighbours_that_do_not_agree() -> None:
    x = jnp.zeros((8, 8))
    words = "has 64 bytes, and the result 32" if RANK == 0 else "has 32 bytes, and the result 64"
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(nt.halo_exchange(x, width=1 + RANK))
    with pytest.raises(Exception, match=r"float32.*int32|int32.*float32"):
        jax.block_until_ready(nt.halo_exchange(x.astype(np.int32) if RANK else x))
    # What follows is right.
    y = nt.halo_exchange(jnp.full(3, float(RANK)), periodic=True)
    assert y.tolist() == [1 - RANK, RANK, 1 - RANK]
