"""Meshes of two axes, in another order than the ranks, and of some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import (
    DEVICES,
    FOUR,
    MESH,
    RANK,
    ROWS,
    SEVERAL,
    SHIFT,
    SIZE,
    D,
    check,
    init_mlp,
    local,
    mapped,
    mesh_2d,
    mlp_step,
    normal,
    numbers,
    put,
    same,
    simulated,
    together,
    trained,
)
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

TWO_AXES: dict[str, Callable[[jax.Array], Any]] = {
    "psum-x": lambda x: lax.psum(x, "x"),
    "psum-y": lambda x: lax.psum(x, "y"),
    "psum-both": lambda x: lax.psum(x, ("x", "y")),
    "psum-both-reversed": lambda x: lax.psum(x, ("y", "x")),
    "psum-then-pmax": lambda x: lax.pmax(lax.psum(x, "x"), "y"),
    "all_gather-y": lambda x: lax.all_gather(x, "y"),
    "all_gather-x-1": lambda x: lax.all_gather(x, "x", axis=1),
    "ppermute-x": lambda x: lax.ppermute(x, "x", [(0, 1), (1, 0)]),
    "ppermute-both": lambda x: lax.ppermute(
        lax.ppermute(x, "y", [(0, 1), (1, 0)]), "x", [(1, 0), (0, 1)]
    ),
    "all_to_all-x": lambda x: lax.all_to_all(x, "x", 1, 1, tiled=True),
    "psum_scatter-y": lambda x: lax.psum_scatter(x, "y", scatter_dimension=1, tiled=True),
    "axis_index": lambda x: x * 10 + lax.axis_index("x") * 2 + lax.axis_index("y"),
}


@FOUR
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=["straight", "permuted"])
def test_two_axes(order: list[int]) -> None:
    f, x, mesh = together(TWO_AXES), numbers((2, 2, 4, 6)), mesh_2d(DEVICES[order])

    def body(x):
        return jax.tree.map(lambda y: y[None, None], f(x[0, 0]))

    got = jax.shard_map(body, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"))
    want = local(jax.vmap(jax.vmap(f, axis_name="y"), axis_name="x"), x)
    check(jax.jit(got)(put(x, P("x", "y"), mesh)), want)


@FOUR
def test_pairs_along_one_of_two_axes() -> None:
    mesh, x = mesh_2d(), numbers((2, 2, 3)) + 10
    body = jax.shard_map(
        lambda x: (lax.ppermute(x, "y", [(0, 1)]), lax.ppermute(x, ("x", "y"), [(3, 1)])),
        mesh=mesh,
        in_specs=P("x", "y"),
        out_specs=P("x", "y"),
    )
    along_y, along_both = np.zeros_like(x), np.zeros_like(x)
    along_y[:, 1], along_both[0, 1] = x[:, 0], x[1, 1]
    check(jax.jit(body)(put(x, P("x", "y"), mesh)), (along_y, along_both))


@FOUR
def test_two_axes_in_order() -> None:
    """`all_gather` and `axis_index` of both axes at once: the first is the slower one."""
    mesh, x = mesh_2d(), numbers((4, 3))
    for axes in (("x", "y"), ("y", "x")):
        body = jax.shard_map(
            lambda x: (lax.all_gather(x, axes, tiled=True), lax.axis_index(axes)[None]),
            mesh=mesh,
            in_specs=P(axes),
            out_specs=P(axes),
        )
        check(
            jax.jit(body)(put(x, P(axes), mesh)), (np.tile(x, (4, 1)), np.arange(4, dtype=np.int32))
        )


@FOUR
@pytest.mark.parametrize("a", [P("x", "y"), P("y", "x"), P(("x", "y")), P(None, "y"), P()], ids=str)
def test_matmul_on_two_axes(a: P) -> None:
    mesh, x, y = mesh_2d(), numbers((D, D)), numbers((D, D), seed=1)
    specs = [P("x", "y"), P(None, ("y", "x")), P("x"), P(("y", "x"))]
    others = [put(y, spec, mesh) for spec in specs]
    out = [NamedSharding(mesh, spec) for spec in reversed(specs)]
    got = jax.jit(lambda x, ys: [x @ y for y in ys], out_shardings=out)(put(x, a, mesh), others)
    check(got, [x @ y] * 4)


@FOUR
def test_partly_manual() -> None:
    """`shard_map` over one axis; the other is XLA's."""
    mesh, x, w = mesh_2d(), numbers((D, D)), numbers((D, D), seed=1)

    def f(x, w):
        return lax.psum(x @ w, "x")

    body = jax.shard_map(
        f, mesh=mesh, axis_names={"x"}, in_specs=(P(None, "x"), P("x")), out_specs=P()
    )
    got = jax.jit(body)(put(x, P("y", "x"), mesh), put(w, P("x", "y"), mesh))
    check(got, x @ w)


@FOUR
def test_data_and_tensor_parallel() -> None:
    mesh, x, y = mesh_2d(), normal((D, D), 3), normal((D, D), 4)
    specs = {"a": P("x", "y"), "b": P("y", "x")}
    params = {name: put(value, specs[name], mesh) for name, value in init_mlp().items()}
    step = jax.jit(mlp_step, donate_argnums=0)
    loss = None
    for _ in range(3):
        params, loss = step(params, put(x, P("x"), mesh), put(y, P("x"), mesh))
    check((params, loss), trained(x, y, 3), 1e-4)


def test_permuted_devices() -> None:
    """The order of the mesh is not that of the ranks."""
    mesh = Mesh(DEVICES[::-1], ("x",), axis_types=(AxisType.Auto,))
    x = numbers((SIZE * 2, 4))

    def f(x):
        return lax.all_gather(x, "x"), lax.ppermute(x, "x", SHIFT), lax.axis_index("x") + x

    got = mapped(f, mesh)(put(x, P("x"), mesh))
    assert got[2].addressable_shards[0].index[0] == slice(
        (SIZE - 1 - RANK) * 2, (SIZE - RANK) * 2, None
    )
    check(got, simulated(f, x))
    check(jax.jit(jnp.cumsum)(put(x, P("x"), mesh)), np.cumsum(x))
    moved = jax.device_put(put(x, P("x"), mesh), NamedSharding(MESH, P("x")))
    check(moved, x)


def test_rotated_devices_with_scatter_and_exchange() -> None:
    mesh = Mesh(np.roll(DEVICES, 1), ("x",), axis_types=(AxisType.Auto,))
    x = numbers((SIZE * SIZE, 4))

    def f(x):
        return lax.psum_scatter(x, "x", tiled=True), lax.all_to_all(x, "x", 0, 0, tiled=True)

    check(mapped(f, mesh)(put(x, P("x"), mesh)), simulated(f, x))


@SEVERAL
@pytest.mark.parametrize("members", [[0, 1], [1, 0], [SIZE - 1, 0], [1]], ids=str)
def test_some_of_the_ranks(members: list[int]) -> None:
    """A mesh over a subset; the others take no part."""
    if RANK in members:
        mesh = Mesh(DEVICES[members], ("x",), axis_types=(AxisType.Auto,))
        count = len(members)
        x = numbers((2 * count, 4))

        def f(x):
            turn = [(i, (i + 1) % count) for i in range(count)]
            total = lax.psum(x, "x") + lax.axis_index("x")
            return total, lax.ppermute(x, "x", turn), lax.all_gather(x, "x")

        check(mapped(f, mesh)(put(x, P("x"), mesh)), simulated(f, x, count=count))
        got = jax.jit(lambda x: (x.sum(0), x.T @ x))(put(x, P("x"), mesh))
        check(got, (x.sum(0), x.T @ x))


@SEVERAL
def test_each_rank_on_a_mesh_of_its_own() -> None:
    """Different programs at once; then all together."""
    mesh = Mesh(DEVICES[[RANK]], ("x",), axis_types=(AxisType.Auto,))
    x = numbers((4, 4), seed=RANK)
    for _ in range(RANK + 1):
        check(jax.jit(lambda x: x @ x + RANK)(put(x, P("x"), mesh)), x @ x + RANK)
    same(lambda x: lax.psum(x, "x"), numbers((SIZE, 3)))


def test_arrays_and_programs_elsewhere() -> None:
    """On devices of other ranks: this one has no part of them."""
    mesh, x = Mesh(DEVICES[:1], ("x",), axis_types=(AxisType.Auto,)), numbers((4, 3))
    sharding = NamedSharding(mesh, ROWS)
    array = jax.make_array_from_callback(x.shape, sharding, lambda i: x[i], dtype=x.dtype)
    doubled = jax.jit(lambda x: x * 2)(array)
    assert len(doubled.addressable_shards) == (RANK == 0)
    if RANK == 0:
        check(doubled, x * 2)


@FOUR
def test_two_halves_at_once() -> None:
    """Ranks 0 and 2 run one program, 1 and 3 another, without knowing of each other."""
    members = [RANK % 2, RANK % 2 + 2]
    mesh = Mesh(DEVICES[members], ("x",), axis_types=(AxisType.Auto,))
    x = numbers((4, 3), seed=RANK % 2)
    for i in range(RANK % 2 + 2):
        check(jax.jit(lambda x: jnp.cumsum(x + i, 0))(put(x, P("x"), mesh)), np.cumsum(x + i, 0))
