"""One collective at a time: each of JAX's, its groups, pairs and specs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives_support import MESH, SHIFT, SIZE, D, check, mapped, numbers, put, same, together
from jax import lax
from jax.sharding import PartitionSpec as P

COLLECTIVES: dict[str, Callable[[jax.Array], Any]] = {
    "psum": lambda x: lax.psum(x, "x"),
    "pmax": lambda x: lax.pmax(x, "x"),
    "pmin": lambda x: lax.pmin(x, "x"),
    "pmean": lambda x: lax.pmean(x, "x"),
    "psum-of-a-constant": lambda x: x * lax.psum(1, "x"),
    "psum-of-a-scalar": lambda x: lax.psum(x.sum(), "x"),
    "psum-of-nothing": lambda x: lax.psum(x[:, :0], "x"),
    "psum-of-a-tree": lambda x: lax.psum({"a": x, "b": (x[0] * 2, x.sum())}, "x"),
    "psum-of-several-dtypes": lambda x: lax.psum((x, x.astype(jnp.int32), x[:2] > 0), "x"),
    "psum-of-a-transpose": lambda x: lax.psum(x.T, "x").T,
    "psum-twice": lambda x: lax.psum(lax.psum(x, "x") * x, "x"),
    "pmax-and-pmin": lambda x: lax.pmax(x, "x") - lax.pmin(x, "x"),
    "all_gather-0": lambda x: lax.all_gather(x, "x"),
    "all_gather-1": lambda x: lax.all_gather(x, "x", axis=1),
    "all_gather-2": lambda x: lax.all_gather(x, "x", axis=2),
    "all_gather-3": lambda x: lax.all_gather(x, "x", axis=3),
    "all_gather-tiled-0": lambda x: lax.all_gather(x, "x", axis=0, tiled=True),
    "all_gather-tiled-1": lambda x: lax.all_gather(x, "x", axis=1, tiled=True),
    "all_gather-tiled-2": lambda x: lax.all_gather(x, "x", axis=2, tiled=True),
    "all_gather-of-length-1": lambda x: lax.all_gather(x[:, :1], "x", axis=1, tiled=True),
    "all_gather-of-a-transpose": lambda x: lax.all_gather(x.transpose(2, 0, 1), "x", axis=1),
    "all_gather-of-a-scalar": lambda x: lax.all_gather(x.sum(), "x"),
    "all_gather-of-a-tree": lambda x: lax.all_gather((x, x[0], x[0, 0, 0]), "x"),
    "all_gather-of-nothing": lambda x: lax.all_gather(x[:, :0], "x"),
    "psum_scatter-0": lambda x: lax.psum_scatter(x[:SIZE], "x"),
    "psum_scatter-1": lambda x: lax.psum_scatter(x[:, :SIZE], "x", scatter_dimension=1),
    "psum_scatter-2": lambda x: lax.psum_scatter(x[:, :, :SIZE], "x", scatter_dimension=2),
    "psum_scatter-tiled-0": lambda x: lax.psum_scatter(x, "x", tiled=True),
    "psum_scatter-tiled-1": lambda x: lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
    "psum_scatter-tiled-2": lambda x: lax.psum_scatter(x, "x", scatter_dimension=2, tiled=True),
    "psum_scatter-of-a-tree": lambda x: lax.psum_scatter((x, x * 2), "x", tiled=True),
    "all_to_all-0-0": lambda x: lax.all_to_all(x[:SIZE], "x", 0, 0),
    "all_to_all-0-2": lambda x: lax.all_to_all(x[:SIZE], "x", 0, 2),
    "all_to_all-1-0": lambda x: lax.all_to_all(x[:, :SIZE], "x", 1, 0),
    "all_to_all-1-2": lambda x: lax.all_to_all(x[:, :SIZE], "x", 1, 2),
    "all_to_all-2-2": lambda x: lax.all_to_all(x[:, :, :SIZE], "x", 2, 2),
    "all_to_all-tiled-0-0": lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True),
    "all_to_all-tiled-0-2": lambda x: lax.all_to_all(x, "x", 0, 2, tiled=True),
    "all_to_all-tiled-1-1": lambda x: lax.all_to_all(x, "x", 1, 1, tiled=True),
    "all_to_all-tiled-2-1": lambda x: lax.all_to_all(x, "x", 2, 1, tiled=True),
    "all_to_all-tiled-2-2": lambda x: lax.all_to_all(x, "x", 2, 2, tiled=True),
    "pswapaxes": lambda x: lax.pswapaxes(x[:, :SIZE], "x", 1),
    "ppermute-shift": lambda x: lax.ppermute(x, "x", SHIFT),
    "ppermute-reversed": lambda x: lax.ppermute(x, "x", [(i, SIZE - 1 - i) for i in range(SIZE)]),
    "ppermute-to-itself": lambda x: lax.ppermute(x, "x", [(i, i) for i in range(SIZE)]),
    "ppermute-swap-and-rest-to-itself": lambda x: lax.ppermute(
        x, "x", [(0, 1), (1, 0), *((i, i) for i in range(2, SIZE))]
    ),
    "ppermute-of-a-tree": lambda x: lax.ppermute((x, x[0] > 0, x.sum()), "x", SHIFT),
    "ppermute-there-and-back": lambda x: lax.ppermute(
        lax.ppermute(x, "x", SHIFT) * 2, "x", [(b, a) for a, b in SHIFT]
    ),
    "pshuffle": lambda x: lax.pshuffle(x, "x", list(reversed(range(SIZE)))),
    "axis_index": lambda x: x + lax.axis_index("x"),
    "axis_index-alone": lambda x: lax.axis_index("x"),
    "axis_size": lambda x: x + lax.axis_size("x"),
    "dynamic_slice-by-axis_index": lambda x: lax.dynamic_slice_in_dim(
        lax.all_gather(x, "x", tiled=True), (SIZE - 1 - lax.axis_index("x")) * 3, 3
    ),
}


@pytest.mark.parametrize("kind", dict.fromkeys(name.split("-")[0] for name in COLLECTIVES))
def test_collective(kind: str) -> None:
    functions = {name: f for name, f in COLLECTIVES.items() if name.split("-")[0] == kind}
    same(together(functions), numbers((SIZE * D, D, D)))


@pytest.mark.parametrize(
    "name", ["psum", "all_gather-1", "psum_scatter-1", "all_to_all-1-2", "ppermute-shift"]
)
def test_collective_alone(name: str) -> None:
    """In a program of its own, whose operands are arguments and whose results are results."""
    same(COLLECTIVES[name], numbers((SIZE * D, D, D)))


PAIRS = {
    "up": SHIFT[:-1],
    "last to first": [(SIZE - 1, 0)],
    "first to last": [(0, SIZE - 1)],
    "first to itself": [(0, 0)],
    "none": [],
    "swap": [(0, 1), (1, 0)] if SIZE > 1 else [],
}


@pytest.mark.parametrize("name", PAIRS)
def test_zeros_where_nobody_sends(name: str) -> None:
    x = numbers((SIZE, 3, 4)) + 10
    want = np.zeros_like(x)
    for source, target in PAIRS[name]:
        want[target] = x[source]
    f = mapped(lambda x: (lax.ppermute(x, "x", PAIRS[name]), lax.ppermute(x > 0, "x", PAIRS[name])))
    check(f(put(x)), (want, want > 0))


@pytest.mark.parametrize("source", [0, SIZE - 1])
def test_broadcast(source: int) -> None:
    """`lax.pbroadcast` itself is not there for JAX's CPU platform; this is what it stands for."""

    def f(x):
        return lax.psum(jnp.where(lax.axis_index("x") == source, x, 0), "x")

    x = numbers((SIZE * 2, 3))
    check(mapped(f)(put(x)), np.tile(x[2 * source : 2 * source + 2], (SIZE, 1)))


def test_result_that_is_the_same_everywhere() -> None:
    x = numbers((SIZE * 2, 3))
    specs = {"in_specs": P("x"), "out_specs": P()}
    got = jax.jit(jax.shard_map(lambda x: lax.psum(x, "x"), mesh=MESH, **specs))(put(x))
    assert got.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(got), x.reshape(SIZE, 2, 3).sum(0))


def test_specs_along_other_axes() -> None:
    a, b = numbers((3, D)), numbers((D, 2, D), seed=1)

    def f(a, b):
        y = lax.all_gather(b, "x", axis=1, tiled=True)
        return lax.psum(a.sum(1), "x"), lax.ppermute(b, "x", SHIFT), y

    specs = {"in_specs": (P(None, "x"), P(None, None, "x")), "out_specs": (P(), P(None, None, "x"))}
    specs["out_specs"] = (*specs["out_specs"], P("x", None, None))
    got = jax.jit(jax.shard_map(f, mesh=MESH, check_vma=False, **specs))
    total, moved, joined = got(put(a, P(None, "x")), put(b, P(None, None, "x")))
    step = D // SIZE
    check(total, a.sum(1))
    check(moved, np.roll(b, step, 2))
    one = np.concatenate([b[:, :, r * step : (r + 1) * step] for r in range(SIZE)], 1)
    check(joined, np.tile(one, (SIZE, 1, 1)))


@pytest.mark.parametrize("name", ["psum", "pmax", "all_gather", "psum_scatter", "all_to_all"])
def test_groups(name: str) -> None:
    """Pairs of ranks where there are 4, else everyone alone; the order inside a group counts."""
    groups = [[2, 0], [1, 3]] if SIZE == 4 else [[i] for i in reversed(range(SIZE))]
    count = len(groups[0])
    x = numbers((SIZE, count, 3))
    options: dict[str, Any] = {"axis_index_groups": groups}
    functions: dict[str, Callable[..., Any]] = {
        "psum": lambda x: lax.psum(x, "x", **options),
        "pmax": lambda x: lax.pmax(x, "x", **options),
        "all_gather": lambda x: lax.all_gather(x[0], "x", **options)[None],
        "psum_scatter": lambda x: lax.psum_scatter(x[0], "x", **options)[None],
        "all_to_all": lambda x: lax.all_to_all(x[0], "x", 0, 0, **options)[None],
    }
    want: list[Any] = [None] * SIZE
    for group in groups:
        parts = x[group]
        for place, rank in enumerate(group):
            want[rank] = {
                "psum": parts.sum(0),
                "pmax": parts.max(0),
                "all_gather": parts,
                "psum_scatter": parts.sum(0)[place],
                "all_to_all": parts[:, place],
            }[name]
    check(mapped(functions[name], check_vma=False)(put(x)), np.stack(want))


def test_groups_of_different_size() -> None:
    groups = [[0], list(range(1, SIZE))]
    x = numbers((SIZE, 3))
    got = mapped(lambda x: lax.psum(x, "x", axis_index_groups=groups), check_vma=False)(put(x))
    check(got, np.stack([x[0], *[x[1:].sum(0)] * (SIZE - 1)]))
