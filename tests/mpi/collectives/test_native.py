"""Native collectives: unmodified programs over the devices of all ranks, and what they should give.

The reference is the same computation on this rank's device alone: `vmap` with an axis name stands
for `shard_map`, and arrays that are not sharded for those that are. The library is not mentioned,
and the file also runs on JAX's CPU backend with several processes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import io_callback, multihost_utils
from jax.experimental.layout import Format, Layout
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RANK, SIZE = jax.process_index(), jax.process_count()
DEVICES = np.array(jax.devices())
#: Divisible by 2, 3 and 4.
D = 12
ROWS, COLUMNS, WHOLE = P("x"), P(None, "x"), P()
SHIFT = [(i, (i + 1) % SIZE) for i in range(SIZE)]

MESH = Mesh(DEVICES, ("x",), axis_types=(AxisType.Auto,))
MESH_EXPLICIT = Mesh(DEVICES, ("x",), axis_types=(AxisType.Explicit,))

FOUR = pytest.mark.skipif(SIZE != 4, reason="needs a mesh of 2 by 2")
SEVERAL = pytest.mark.skipif(SIZE < 2, reason="needs several ranks")


def mesh_2d(devices: Any = None) -> Mesh:
    devices = DEVICES if devices is None else devices
    return Mesh(np.reshape(devices, (2, 2)), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def numbers(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Small whole numbers, so that sums are exact in any order."""
    values = np.random.default_rng(seed).integers(-4, 5, tuple(shape))
    if np.dtype(dtype).kind in "ub":
        values = abs(values)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * np.random.default_rng(seed + 1).integers(-4, 5, tuple(shape))
    return values.astype(dtype)


def normal(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)


def put(value: Any, spec: P = ROWS, mesh: Mesh = MESH) -> jax.Array:
    """An array over all ranks; each gives its own part."""
    value = np.asarray(value)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value if value.dtype.kind in "biufc" else value.astype(np.float32)


def check(got: Any, want: Any, tolerance: float = 0.0) -> None:
    """This rank's parts are those of the expected whole; the other ranks check theirs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, array), whole in leaves:
        name, expected = jax.tree_util.keystr(path), np.asarray(whole)
        assert array.shape == expected.shape, name
        assert array.dtype == expected.dtype, name
        assert array.addressable_shards, name
        for shard in array.addressable_shards:
            here, there = wide(shard.data), wide(expected[shard.index])
            if tolerance:
                np.testing.assert_allclose(here, there, tolerance, tolerance, err_msg=name)
            else:
                np.testing.assert_array_equal(here, there, err_msg=name)


def together(functions: dict[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    """All of them in one program, which is faster than a program for each."""
    return lambda *args: {name: f(*args) for name, f in functions.items()}


def local(f: Callable[..., Any], *args: Any) -> Any:
    """`f` of whole arrays, on this rank's device alone; compiled in a hurry."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    results = jax.jit(f, compiler_options=options)(*jax.device_put(args, jax.local_devices()[0]))
    return jax.tree.map(np.asarray, results)


def at_least_1d(tree: Any) -> Any:
    return jax.tree.map(lambda y: y[None] if jnp.ndim(y) == 0 else y, tree)


def simulated(f: Callable[..., Any], *args: np.ndarray, count: int = SIZE) -> Any:
    """`shard_map` of `f` along the first axis, by `vmap` on this rank's device."""
    blocks = [x.reshape(count, x.shape[0] // count, *x.shape[1:]) for x in args]
    results = local(jax.vmap(lambda *b: at_least_1d(f(*b)), axis_name="x"), *blocks)
    return jax.tree.map(lambda y: y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]), results)


def mapped(f: Callable[..., Any], mesh: Mesh = MESH, check_vma: bool = True) -> Any:
    def body(*blocks: Any) -> Any:
        return at_least_1d(f(*blocks))

    specs = {"in_specs": P("x"), "out_specs": P("x")}
    return jax.jit(jax.shard_map(body, mesh=mesh, check_vma=check_vma, **specs))


def same(f: Callable[..., Any], *args: np.ndarray, tolerance: float = 0.0, **options: Any) -> None:
    """`shard_map` of `f` gives what the simulation gives."""
    check(mapped(f, **options)(*map(put, args)), simulated(f, *args), tolerance)


def varying(x: jax.Array) -> jax.Array:
    """Something that is the same everywhere as something that need not be."""
    return lax.pcast(x, "x", to="varying")


# --- One collective ------------------------------------------------------------------------------

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


# --- Types ---------------------------------------------------------------------------------------

KINDS: dict[str, list[str]] = {
    "bool": ["bool"],
    "signed": ["int8", "int16", "int32", "int64"],
    "unsigned": ["uint8", "uint16", "uint32", "uint64"],
    "real": ["float32", "float64"],
    "half": ["float16", "bfloat16"],
    "complex": ["complex64", "complex128"],
}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def moved(*arrays: jax.Array) -> Any:
    return [
        (
            lax.ppermute(x, "x", SHIFT),
            lax.all_gather(x, "x", axis=1),
            lax.all_to_all(x, "x", 1, 0, tiled=True),
        )
        for x in arrays
    ]


def counted(dtype: str) -> np.ndarray:
    return (np.arange(SIZE * 3 * D).reshape(SIZE * 3, D) % 5).astype(dtype_of(dtype))


def exchange(x: jax.Array) -> jax.Array:
    """Its pieces lie one after the other, so nothing but the exchange copies them."""
    return lax.all_to_all(x, "x", 0, 0, tiled=True)


#: Steps of loops in which arrays take each other's memory while they are exchanged.
STEPS: dict[str, Callable[..., Any]] = {
    "itself": lambda i, x, y: (exchange(x), y),
    "both": lambda i, x, y: (exchange(x), exchange(y)),
    "crosswise": lambda i, x, y: (exchange(y), exchange(x)),
    "kept": lambda i, x, y: (x + exchange(y), x),
    "overwritten": lambda i, x, y: (x * 2 + i, exchange(x)),
    "updated": lambda i, x, y: (x.at[0].set(i), exchange(x)),
    "updated after": lambda i, x, y: (exchange(x).at[0].add(y[1]), exchange(x.at[1].set(0))),
    "read": lambda i, x, y: (exchange(x @ x.T @ y), y + x),
    "branches": lambda i, x, y: (
        *lax.cond(i % 2 == 0, lambda x, y: (exchange(x), x), lambda x, y: (y, exchange(y)), x, y),
    ),
}


@pytest.mark.parametrize("donate", [(), (0, 1)])
@pytest.mark.parametrize("step", STEPS)
def test_whole_arrays_are_exchanged(step: str, donate: tuple[int, ...]) -> None:
    def loop(x: jax.Array, y: jax.Array) -> Any:
        x, y = STEPS[step](0, x, y)
        x, y = lax.fori_loop(1, 4, lambda i, c: STEPS[step](i, *c), (x, y))
        return exchange(x) % 7, y % 7, exchange(y) % 7

    arrays = [numbers((SIZE * D, D), seed=seed) for seed in (1, 2)]
    sharded = [jax.device_put(x, NamedSharding(MESH, ROWS)) for x in arrays]
    mapped = jax.shard_map(loop, mesh=MESH, in_specs=ROWS, out_specs=ROWS)
    results = jax.jit(mapped, donate_argnums=donate)(*sharded)
    parts = [x.reshape(SIZE, D, D) for x in arrays]
    for result, want in zip(results, jax.vmap(loop, axis_name="x")(*parts), strict=True):
        np.testing.assert_array_equal(result.addressable_shards[0].data, want[RANK])


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_moved(kind: str) -> None:
    with jax.enable_x64(True):
        same(moved, *map(counted, KINDS[kind]))


def test_8_bit_floats_are_moved() -> None:
    same(moved, *map(counted, ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]))


@pytest.mark.not_on_gpu("XLA:GPU leaves them, and they are refused")
def test_8_bit_floats_are_reduced() -> None:
    x = counted("float8_e4m3fn") % 3, counted("float8_e5m2") % 3
    same(lambda *x: (lax.psum(x, "x"), lax.pmax(x, "x")), *x)


@pytest.mark.parametrize("place", range(3))
def test_4_bit_floats_are_moved(place: int) -> None:
    same(lambda x: moved(x)[0][place], counted("float4_e2m1fn"))


def test_8_bit_floats_are_partitioned_and_donated() -> None:
    sharding = NamedSharding(MESH, ROWS)
    values = counted("float8_e4m3fn")
    x = jax.device_put(values, sharding)
    step = jax.jit(lambda x: lax.with_sharding_constraint(x + x[::-1], sharding), donate_argnums=0)
    y = step(x)
    assert x.is_deleted()
    assert y.sharding == sharding and y.dtype == values.dtype
    want = (values.astype(np.float32) + values[::-1].astype(np.float32)).astype(values.dtype)
    np.testing.assert_array_equal(multihost_utils.process_allgather(y, tiled=True), want)


@pytest.mark.parametrize("place", range(3))
def test_4_bit_integers_are_moved(place: int) -> None:
    """One at a time: XLA's CPU compiler does not survive all three in one program."""
    same(lambda x: moved(x)[0][place], counted("int4"))


def reduced(*arrays: jax.Array) -> Any:
    results = []
    for x in arrays:
        results += [lax.psum(x, "x"), lax.psum_scatter(x, "x", tiled=True)]
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            results += [lax.pmax(x, "x"), lax.pmin(x, "x")]
    return results


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bool"])
def test_dtypes_are_reduced(kind: str) -> None:
    arrays = [numbers((SIZE * D, 3), dtype_of(dtype)) for dtype in KINDS[kind]]
    with jax.enable_x64(True):
        same(reduced, *arrays, tolerance=0 if "signed" in kind else 1e-2)


def test_extremes() -> None:
    """The largest and smallest of each type, and infinities."""
    arrays = []
    for dtype in ("int8", "uint8", "int32", "uint32", "float32"):
        info = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
        arrays.append(np.array([[info.min, info.max, 1], [info.max, info.min, 0]] * SIZE, dtype))
    arrays[-1][0, 0], arrays[-1][-1, 1] = np.inf, -np.inf
    same(lambda *x: (lax.pmax(x, "x"), lax.pmin(x, "x")), *arrays)


def test_nan_is_passed_on() -> None:
    x = numbers((SIZE, 4))
    x[-1, 1] = x[0, 2] = np.nan
    same(lambda x: (lax.pmax(x, "x"), lax.pmin(x, "x"), lax.psum(x, "x")), x)


def test_bool_is_reduced() -> None:
    x = np.array([[True, True, False, False]] * SIZE)
    x[-1] = [True, False, True, False]
    reduce = jax.jit(lambda x: (x.all(0), x.any(0), jnp.count_nonzero(x, 0), x.sum(), x.max(0)))
    check(reduce(put(x)), local(reduce, x))


# --- Control flow --------------------------------------------------------------------------------


def flow_fori_plain(x):
    return lax.fori_loop(0, 5, lambda i, y: lax.ppermute(y, "x", SHIFT) + i * x, x)


def flow_fori_with_traced_bound(x):
    bound = lax.psum(1, "x") + lax.pmax(x[0, 0], "x").astype(jnp.int32) % 3
    return lax.fori_loop(0, bound, lambda i, y: lax.psum(y, "x") * 0.25 + x + i, x)


def flow_while_condition(x):
    """The number of steps is decided by all."""
    return lax.while_loop(
        lambda y: lax.pmax(abs(y).max(), "x") < 1e3,
        lambda y: y * 2 + lax.ppermute(y, "x", SHIFT),
        x + 9,
    )


def flow_while_only_condition(x):
    return lax.while_loop(lambda y: lax.psum(y.sum(), "x") < 500.0, lambda y: y + 1, x)


def flow_scan_forward(x):
    def body(carry, row):
        total = lax.psum(row, "x")
        return carry + total + row, (total, lax.ppermute(carry, "x", SHIFT))

    return lax.scan(body, x[0] * 0, x)


def flow_scan_reverse_unrolled(x):
    def body(carry, row):
        return lax.ppermute(carry + row, "x", SHIFT), carry.sum()

    carry, sums = lax.scan(body, x[0], x, reverse=True, unroll=2)
    return carry, sums


def flow_cond_plain(x):
    return lax.cond(
        lax.psum(x.sum(), "x") > -1e6,
        lambda x: lax.ppermute(x, "x", SHIFT),
        lambda x: x * lax.psum(x, "x"),
        x,
    )


def flow_cond_in_loop(x):
    def body(i, y):
        return lax.cond(
            i % 2 == 0,
            lambda y: lax.ppermute(y, "x", SHIFT),
            lambda y: y + lax.psum(y, "x") * 0.5,
            y,
        )

    return lax.fori_loop(0, 4, body, x)


def flow_cond_without_collectives(x):
    """Each rank takes its own branch; the collective is after it."""
    y = lax.cond(lax.axis_index("x") == 0, lambda x: x * 3, lambda x: x - 1, x)
    return lax.psum(y, "x") + y


def flow_cond_of_three(x):
    return lax.switch(
        lax.pmax(x[0, 0], "x").astype(jnp.int32) % 3,
        [
            lambda x: lax.ppermute(x, "x", SHIFT),
            lambda x: x + lax.pmax(x, "x"),
            lambda x: x * lax.psum(x, "x"),
        ],
        x,
    )


def flow_nested_loops(x):
    def inner(_, y):
        return lax.ppermute(y, "x", SHIFT) + x

    def outer(carry, row):
        carry = lax.fori_loop(0, 2, inner, carry)
        carry = lax.while_loop(
            lambda y: lax.pmax(y.max(), "x") > 50, lambda y: y - lax.pmean(y, "x") - 5, carry
        )
        return carry + row, lax.psum(carry.sum(), "x")

    return lax.scan(outer, x, x)


def flow_map_rows(x):
    return lax.map(lambda row: row + lax.psum(row * 2, "x"), x)


def flow_map_of_batches(x):
    return lax.map(lambda row: row - lax.pmin(row, "x"), x, batch_size=2)


def flow_map_by_vmap(x):
    return jax.vmap(lambda row: lax.ppermute(row, "x", SHIFT) + lax.psum(row, "x"))(x)


def flow_call_of_jit(x):
    inner = jax.jit(lambda y: lax.psum(y, "x") + lax.ppermute(y, "x", SHIFT))
    return inner(x) + inner(x * 2)


def flow_fori_unequal_trips(x):
    """Loops of which each rank makes its own number of steps, without collectives inside."""
    steps = lax.axis_index("x") + 1
    y = lax.fori_loop(0, steps, lambda _, y: y * 2, x)
    return lax.psum(y, "x") + y


def flow_fori_long(x):
    return lax.fori_loop(0, 200, lambda _, y: lax.ppermute(y, "x", SHIFT) + 1, x)


def flow_many_independent(x):
    return [lax.psum(x * i, "x") if i % 2 else lax.ppermute(x * i, "x", SHIFT) for i in range(8)]


def flow_many_kinds(x):
    a = lax.psum(x, "x")
    b = lax.all_gather(x, "x")
    c = lax.psum_scatter(jnp.tile(x, (SIZE, 1)), "x", tiled=True)
    d = lax.all_to_all(jnp.tile(x, (SIZE, 1)), "x", 0, 0, tiled=True)
    return a, b, c, d, lax.pmax(x + c, "x") + b[0], lax.ppermute(d, "x", SHIFT)


def flow_call_in_a_long_chain(x):
    for i in range(15):
        x = lax.ppermute(x, "x", SHIFT) + lax.pmean(x, "x") if i % 3 == 0 else x * 0.5 + i
    return x


FLOWS: dict[str, Callable[..., Any]] = {
    name.removeprefix("flow_"): f for name, f in globals().items() if name.startswith("flow_")
}


@pytest.mark.parametrize("kind", dict.fromkeys(name.split("_")[0] for name in FLOWS))
def test_control_flow(kind: str) -> None:
    functions = {name: f for name, f in FLOWS.items() if name.split("_")[0] == kind}
    same(together(functions), numbers((SIZE * 3, 4)), tolerance=1e-5)


# --- Derivatives ---------------------------------------------------------------------------------


def gradient_of_psum(x):
    return jax.grad(lambda x: lax.psum((x**2 * jnp.arange(4.0)).sum(), "x"))(x)


def gradient_of_pmean_of_product(x):
    return jax.value_and_grad(lambda x: lax.pmean((x * lax.pmean(x, "x")).sum(), "x"))(x)


def gradient_of_ppermute(x):
    return jax.grad(lambda y: lax.psum((lax.ppermute(y, "x", SHIFT) * x).sum(), "x"))(x)


def gradient_of_all_gather(x):
    weights = jnp.arange(float(SIZE))[:, None, None]
    return jax.grad(lambda y: lax.psum((lax.all_gather(y, "x") * weights * x).sum(), "x"))(x)


def gradient_of_psum_scatter(x):
    def loss(y):
        return lax.psum((lax.psum_scatter(jnp.tile(y, (SIZE, 1)), "x", tiled=True) ** 2).sum(), "x")

    return jax.grad(loss)(x)


def gradient_of_all_to_all(x):
    def loss(y):
        y = lax.all_to_all(jnp.tile(y, (SIZE, 1)), "x", 0, 1, tiled=True)
        return lax.psum((y**2 * jnp.arange(y.shape[1])).sum(), "x")

    return jax.grad(loss)(x)


def gradient_with_scan(x):
    def loss(x):
        def body(c, row):
            return jnp.sin(lax.ppermute(c, "x", SHIFT)) + row, lax.psum(c, "x")

        c, totals = lax.scan(body, x[0], x)
        return lax.psum(c.sum(), "x") + totals.sum()

    return jax.grad(loss)(x)


def gradient_with_remat(x):
    @jax.checkpoint
    def layer(x):
        return jnp.sin(lax.psum(x, "x")) * x

    return jax.grad(lambda x: lax.psum(layer(layer(x)).sum(), "x"))(x)


def gradient_with_custom_vjp(x):
    @jax.custom_vjp
    def f(x):
        return lax.ppermute(x, "x", SHIFT)

    def forward(x):
        return f(x), x

    def backward(x, g):
        return (lax.ppermute(g, "x", [(b, a) for a, b in SHIFT]) * 3 + lax.pmax(x, "x"),)

    f.defvjp(forward, backward)
    return jax.grad(lambda x: lax.psum((f(x) ** 2).sum(), "x"))(x)


def gradient_with_jvp(x):
    return jax.jvp(lambda x: lax.pmean(jnp.sin(x), "x") * x, (x,), (x * 0.5,))


def gradient_with_cond(x):
    def loss(x):
        y = lax.cond(
            lax.psum(1, "x") > 1, lambda x: lax.ppermute(x, "x", SHIFT) ** 2, lambda x: x, x
        )
        return lax.psum(y.sum(), "x")

    return jax.grad(loss)(x)


GRADIENTS: dict[str, Callable[..., Any]] = {
    name.removeprefix("gradient_"): f
    for name, f in globals().items()
    if name.startswith("gradient_")
}


@pytest.mark.parametrize("kind", ["of", "with"])
def test_gradient_in_shard_map(kind: str) -> None:
    """The reference differentiates the same function of all blocks at once."""
    x = normal((SIZE * 3, 4))
    functions = {name: f for name, f in GRADIENTS.items() if name.split("_")[0] == kind}
    got = mapped(together(functions))(put(x))
    check(got, {name: REFERENCES[name](x) for name in functions}, 1e-4)


def of_total(loss: Callable[[jax.Array], jax.Array]) -> Callable[[np.ndarray], Any]:
    """The gradient of a function of all blocks at once."""

    def gradient(x: np.ndarray) -> Any:
        g = local(jax.grad(lambda b: loss(b)), x.reshape(SIZE, -1, x.shape[1]))
        return g.reshape(x.shape)

    return gradient


def shifted(b: jax.Array) -> jax.Array:
    return jnp.roll(b, 1, 0)


def reference_scan(b):
    def body(c, rows):
        return jnp.sin(shifted(c)) + rows, c.sum(0)

    c, totals = lax.scan(body, b[:, 0], b.swapaxes(0, 1))
    return c.sum() + totals.sum()


def reference_remat(b):
    def layer(b):
        return jnp.sin(b.sum(0)) * b

    return layer(layer(b)).sum()


def reference_all_gather(x: np.ndarray) -> np.ndarray:
    """Block j is weighted by j and the sum of all blocks."""
    b = x.reshape(SIZE, -1, x.shape[1])
    return (np.arange(SIZE)[:, None, None] * b.sum(0)).astype(np.float32).reshape(x.shape)


def reference_all_to_all(b):
    """Every rank gets every block, side by side."""
    wide = jnp.concatenate(list(b), 1)
    return SIZE * (wide**2 * jnp.arange(wide.shape[1])).sum()


def reference_pmean_of_product(x: np.ndarray) -> Any:
    b = x.reshape(SIZE, -1, x.shape[1])
    value, g = local(jax.value_and_grad(lambda b: (b.mean(0) ** 2).sum()), b)
    return np.full(SIZE, value), g.reshape(x.shape)


def reference_custom_vjp(x: np.ndarray) -> np.ndarray:
    b = x.reshape(SIZE, -1, x.shape[1])
    return (6 * b + b.max(0)).reshape(x.shape)


def reference_jvp(x: np.ndarray) -> Any:
    def f(b):
        return jnp.sin(b).mean(0) * b

    b = x.reshape(SIZE, -1, x.shape[1])
    results = local(lambda b: jax.jvp(f, (b,), (b * 0.5,)), b)
    return jax.tree.map(lambda y: y.reshape(x.shape), results)


def reference_ppermute(x: np.ndarray) -> np.ndarray:
    return np.roll(x.reshape(SIZE, -1, x.shape[1]), -1, 0).reshape(x.shape)


REFERENCES: dict[str, Callable[[np.ndarray], Any]] = {
    "of_psum": of_total(lambda b: (b**2 * jnp.arange(4.0)).sum()),
    "of_pmean_of_product": reference_pmean_of_product,
    "of_ppermute": reference_ppermute,
    "of_all_gather": reference_all_gather,
    "of_psum_scatter": of_total(lambda b: SIZE * (b.sum(0) ** 2).sum()),
    "of_all_to_all": of_total(reference_all_to_all),
    "with_scan": of_total(reference_scan),
    "with_remat": of_total(reference_remat),
    "with_custom_vjp": reference_custom_vjp,
    "with_jvp": reference_jvp,
    "with_cond": of_total(lambda b: (shifted(b) ** 2).sum() if SIZE > 1 else b.sum()),
}


# --- Partitioned by XLA --------------------------------------------------------------------------

SPECS = {"rows": ROWS, "columns": COLUMNS, "whole": WHOLE}


@pytest.mark.parametrize("a", SPECS)
def test_matmul(a: str) -> None:
    """Each combination of operands, to each sharding of the result."""
    x, y = numbers((D, 2 * D)), numbers((2 * D, D), seed=1)
    others = [put(y, spec) for spec in SPECS.values()]
    out = [[NamedSharding(MESH, spec) for spec in SPECS.values()]] * 3
    f = jax.jit(lambda x, ys: [[x @ y] * 3 for y in ys], out_shardings=out)
    check(f(put(x, SPECS[a]), others), [[x @ y] * 3] * 3)


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def window(x, kind):
    init, op = (0.0, lax.add) if kind == "sum" else (-jnp.inf, lax.max)
    return lax.reduce_window(x, init, op, (3, 3), (1, 1), "SAME")


#: Function of an array sharded along its rows and one along its columns, and the sharding of the
#: results (none: XLA's choice).
Automatic = dict[str, tuple[Callable[[jax.Array, jax.Array], Any], P | None]]
AUTOMATIC: dict[str, Automatic] = {
    "sums": {
        "rows": (lambda r, c: (r.sum(), r.sum(0), r.sum(1)), None),
        "columns": (lambda r, c: (c.sum(), c.sum(0), c.sum(1)), None),
        "moments": (lambda r, c: (r.mean(0), r.var(), c.std(1)), WHOLE),
        "norms": (lambda r, c: (jnp.linalg.norm(r), jnp.linalg.norm(c, axis=0)), WHOLE),
    },
    "products and extremes": {
        "extremes": (lambda r, c: (r.max(0), r.min(0), c.max(), c.min(1)), None),
        "product": (lambda r, c: (r / 3).prod(0), WHOLE),
        "complex product": (lambda r, c: ((r + 1j * c) / 4).prod(0), WHOLE),
        "logsumexp": (lambda r, c: jax.nn.logsumexp(r, (0, 1)), WHOLE),
    },
    "where extremes are": {
        "argmax": (lambda r, c: (r.argmax(0), r.argmin(1), r.argmax()), None),
        "argmin": (lambda r, c: (c.argmin(0), c.argmax(1)), WHOLE),
    },
    "sorts": {
        "along the sharded axis": (lambda r, c: jnp.sort(r, 0), ROWS),
        "along the other": (lambda r, c: jnp.sort(r, 1), None),
        "argsort": (lambda r, c: jnp.argsort(r, 0), None),
    },
    "selections": {
        "top_k of rows": (lambda r, c: lax.top_k(r, 3), None),
        "top_k along columns": (lambda r, c: lax.top_k(c, 3)[0], WHOLE),
        "searchsorted": (lambda r, c: jnp.searchsorted(jnp.sort(r.ravel()), c[0]), WHOLE),
    },
    "sets": {
        "bincount": (lambda r, c: jnp.bincount((r + 4).astype(int).ravel(), length=9), WHOLE),
        "histogram": (lambda r, c: jnp.histogram(c, 4, (-4, 4))[0], WHOLE),
    },
    "cumulative": {
        "sum": (lambda r, c: jnp.cumsum(r, 0), ROWS),
        "product": (lambda r, c: jnp.cumprod(r / 2, 0), None),
        "maximum from the end": (lambda r, c: lax.cummax(c, 1, reverse=True), COLUMNS),
    },
    "associative scans": {
        "linear": (
            lambda r, c: lax.associative_scan(
                lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1]), (r / 4, c)
            ),
            ROWS,
        ),
    },
    "shapes": {
        "transpose": (lambda r, c: r.T, ROWS),
        "free transpose": (lambda r, c: r.T, None),
        "flat": (lambda r, c: r.reshape(-1), ROWS),
        "split": (lambda r, c: c.reshape(2, 6, D), P(None, None, "x")),
        "mixed": (lambda r, c: c.reshape(D // 2, 2 * D), COLUMNS),
        "expanded": (lambda r, c: r[:, None] + c[None], P(None, "x")),
    },
    "joins": {
        "along the sharded axis": (lambda r, c: jnp.concatenate([r, r + 1], 0), ROWS),
        "along the other": (lambda r, c: jnp.concatenate([r, c], 1), ROWS),
        "stack": (lambda r, c: jnp.stack([r, c]), P(None, "x")),
        "repeat": (lambda r, c: jnp.repeat(r, 2, 0), ROWS),
        "tile": (lambda r, c: jnp.tile(r, (2, 1)), ROWS),
    },
    "edges": {
        "pad": (lambda r, c: jnp.pad(r, ((3, D - 3), (0, 0))), ROWS),
        "roll": (lambda r, c: jnp.roll(r, 1, 0), ROWS),
        "roll both axes": (lambda r, c: jnp.roll(r, (5, -2), (0, 1)), COLUMNS),
        "flip": (lambda r, c: r[::-1], ROWS),
        "slice": (lambda r, c: r[2:-4:2], WHOLE),
        "stencil": (lambda r, c: jnp.roll(c, 1, 1) + jnp.roll(c, -1, 1) - 2 * c, COLUMNS),
    },
    "reads by index": {
        "rows": (lambda r, c: r[jnp.array([3, 0, 11, 3])], WHOLE),
        "by a sharded index": (lambda r, c: r[jnp.argsort(c[:, 0])], ROWS),
        "take_along_axis": (lambda r, c: jnp.take_along_axis(r, jnp.argsort(c, 0), 0), ROWS),
        "dynamic_slice": (lambda r, c: lax.dynamic_slice(r, (4, 1), (6, 2)), WHOLE),
        "by a computed place": (lambda r, c: r[c.argmax() % D], WHOLE),
        "one hot": (lambda r, c: jax.nn.one_hot(r[:, 0].astype(int) + 4, D), COLUMNS),
    },
    "writes by index": {
        "add": (lambda r, c: r.at[jnp.array([1, 7, 1])].add(c[:3]), ROWS),
        "set": (lambda r, c: r.at[5].set(7).at[:, 2].multiply(3), ROWS),
        "slice": (lambda r, c: lax.dynamic_update_slice(r, jnp.ones((5, 2)), (4, 1)), ROWS),
        "segment_sum": (lambda r, c: jax.ops.segment_sum(r, jnp.arange(D) % 5, 5), WHOLE),
        "by a sharded index": (lambda r, c: r.at[jnp.argsort(c[:, 0])].set(c), ROWS),
    },
    "einsum": {
        "trace": (lambda r, c: jnp.einsum("ij,ji->", r, c), WHOLE),
        "three": (lambda r, c: jnp.einsum("ij,jk,kl->il", r, c, r), COLUMNS),
        "batch": (
            lambda r, c: jnp.einsum("bij,bjk->bik", r.reshape(D, 4, 3), c.reshape(D, 3, 4)),
            ROWS,
        ),
        "outer": (lambda r, c: jnp.outer(r[:, 0], c[0]), COLUMNS),
        "tensordot": (lambda r, c: jnp.tensordot(r, r, 2), WHOLE),
        "complex": (lambda r, c: ((r + 1j * c) @ (r - 1j * c)).sum(0), WHOLE),
    },
    "narrow types": {
        "bfloat16": (lambda r, c: c.astype(jnp.bfloat16) @ r.astype(jnp.bfloat16), WHOLE),
        "float16": (lambda r, c: r.astype(jnp.float16).sum(0), WHOLE),
        "int8": (lambda r, c: c.astype(jnp.int8) @ r.astype(jnp.int8), WHOLE),
        "uint8": (lambda r, c: abs(r).astype(jnp.uint8).max(0), WHOLE),
        "uint16": (lambda r, c: abs(r).astype(jnp.uint16).prod(0), WHOLE),
    },
    "normalisations": {
        "softmax": (lambda r, c: jax.nn.softmax(r, 0), ROWS),
        "layers": (lambda r, c: layer_norm(c), COLUMNS),
    },
    "windows": {
        "sum": (lambda r, c: window(r, "sum"), ROWS),
        "maximum": (lambda r, c: window(c, "max"), COLUMNS),
        "convolve": (lambda r, c: jnp.convolve(r.ravel(), jnp.arange(5.0), "same"), ROWS),
    },
    "Fourier": {
        "along the sharded axis": (lambda r, c: jnp.fft.fft(r, axis=0), ROWS),
        "along the other": (lambda r, c: jnp.fft.fft(r, axis=1), ROWS),
        "both and back": (lambda r, c: jnp.fft.ifft2(jnp.fft.fft2(r) * 2), COLUMNS),
        "real": (lambda r, c: jnp.fft.irfft(jnp.fft.rfft(r, axis=0), axis=0), ROWS),
    },
    "matrices": {
        "cholesky": (lambda r, c: jnp.linalg.cholesky(r @ r.T + 99 * jnp.eye(D)), ROWS),
        "solve": (lambda r, c: jnp.linalg.solve(r + 50 * jnp.eye(D), c), ROWS),
        "qr": (lambda r, c: abs(jnp.linalg.qr(r + 20 * jnp.eye(D))[1]), WHOLE),
        "determinant": (lambda r, c: jnp.linalg.slogdet(c + 50 * jnp.eye(D)), WHOLE),
        "eigenvalues": (lambda r, c: jnp.linalg.eigvalsh(r + r.T), WHOLE),
        "triangular solve": (
            lambda r, c: lax.linalg.triangular_solve(r + 50 * jnp.eye(D), c, left_side=True),
            None,
        ),
    },
    "reductions of pairs": {
        "two at once": (
            lambda r, c: lax.reduce(
                (r, -r),
                (jnp.float32(0), jnp.float32(0)),
                lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1])),
                (0,),
            ),
            WHOLE,
        ),
    },
    "loops": {
        "fori_loop": (lambda r, c: lax.fori_loop(0, 4, lambda _, y: jnp.tanh(y @ c / 9), r), ROWS),
        "scan over the sharded axis": (
            lambda r, c: lax.scan(lambda a, x: (a + x, a * x), r[0] * 0, r),
            None,
        ),
        "while_loop": (
            lambda r, c: lax.while_loop(lambda y: (y**2).sum() < 1e4, lambda y: y * 1.5, r),
            ROWS,
        ),
        "cond": (
            lambda r, c: lax.cond(r.sum() > 0, lambda r: r - r.mean(0), lambda r: r.T @ r, r),
            COLUMNS,
        ),
    },
}


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_automatic(kind: str) -> None:
    functions = together({name: f for name, (f, _) in AUTOMATIC[kind].items()})
    specs = {name: spec for name, (_, spec) in AUTOMATIC[kind].items()}
    out = {
        name: spec if spec is None else NamedSharding(MESH, spec) for name, spec in specs.items()
    }
    r, c = numbers((D, D)), numbers((D, D), seed=1)
    got = jax.jit(functions, out_shardings=out)(put(r, ROWS), put(c, COLUMNS))
    check(got, local(functions, r, c), 1e-4)


OWN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bits": lambda x: lax.reduce(x.astype(int), jnp.int32(-1), lax.bitwise_and, (0,)),
    "parity": lambda x: lax.reduce(x > 0, False, lax.bitwise_xor, (0,)),
    "hypot": lambda x: lax.reduce(x, jnp.float32(0), lambda a, b: jnp.sqrt(a * a + b * b), (0,)),
}


@SEVERAL
@pytest.mark.parametrize("name", OWN)
@pytest.mark.not_on_gpu("XLA:GPU ends the process when it compiles them")
def test_reductions_that_xla_does_not_know(name: str) -> None:
    """XLA's CPU compiler refuses them on a sharded axis; the ranks go on."""
    x = numbers((D, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Unsupported reduction computation"):
        jax.jit(OWN[name], out_shardings=NamedSharding(MESH, WHOLE))(put(x))
    check(jax.jit(OWN[name])(put(x.T.copy(), WHOLE)), local(OWN[name], x.T), 1e-5)


LINEAR: dict[str, Callable[[jax.Array], Any]] = {
    "cholesky": lambda a: jnp.linalg.cholesky(a @ a.mT + 9 * jnp.eye(D)),
    "solve": lambda a: jnp.linalg.solve(a + 9 * jnp.eye(D), a),
    "qr": lambda a: (lambda q, r: (q @ r, abs(r)))(*jnp.linalg.qr(a)),
    "svd": lambda a: (lambda u, s, v: ((u * s[..., None, :]) @ v, s))(*jnp.linalg.svd(a)),
}


def test_linear_algebra_on_a_sharded_batch() -> None:
    a = normal((D, D, D))
    check(jax.jit(together(LINEAR))(put(a)), local(together(LINEAR), a), 1e-3)


@pytest.mark.parametrize("axis", range(4), ids=["batch", "height", "width", "channels"])
def test_convolution(axis: int) -> None:
    x, kernel = numbers((D, D, D, D)), numbers((3, 3, D, D), seed=1)

    def convolve(**options: Any) -> Callable[..., Any]:
        def f(x, kernel):
            if "feature_group_count" in options:
                kernel = kernel[:, :, :1]
            settings = {"window_strides": (1, 1), "padding": "SAME", **options}
            numbering = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(x, kernel, dimension_numbers=numbering, **settings)

        return f

    f = together(
        {
            "plain": convolve(),
            "strided": convolve(window_strides=(2, 1)),
            "grouped": convolve(feature_group_count=D),
            "gradient": jax.grad(lambda x, k: (convolve()(x, k) ** 2).sum(), 1),
        }
    )
    got = jax.jit(f, out_shardings=NamedSharding(MESH, WHOLE))
    check(got(put(x, P(*[None] * axis, "x")), put(kernel, WHOLE)), local(f, x, kernel), 1e-4)


RANDOM: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda key: jax.random.normal(key, (D, 5)),
    "uniform": lambda key: jax.random.uniform(key, (D,)),
    "bits": lambda key: jax.random.bits(key, (D, 5)),
}


def test_random_numbers_do_not_depend_on_the_sharding() -> None:
    def f():
        return together(RANDOM)(jax.random.key(7))

    check(jax.jit(f, out_shardings=NamedSharding(MESH, ROWS))(), local(f), 1e-6)


def test_random_bits_of_the_device() -> None:
    """`rbg` keys: XLA's RngBitGenerator, which all ranks must run alike."""

    @partial(jax.jit, out_shardings=NamedSharding(MESH, P()))
    def f():
        return jax.random.normal(jax.random.key(3, impl="rbg"), (D, 2))

    check(f(), local(lambda: jax.random.normal(jax.random.key(3, impl="rbg"), (D, 2))), 1e-6)


def test_random_keys_are_sharded() -> None:
    keys = jax.jit(
        lambda: jax.random.split(jax.random.key(0), D), out_shardings=NamedSharding(MESH, P("x"))
    )()
    got = jax.jit(lambda keys: jax.random.key_data(keys))(keys)
    check(got, local(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), D))))


@pytest.mark.parametrize("source", SPECS)
def test_resharding(source: str) -> None:
    x = numbers((D, 2 * D))
    placed, targets = put(x, SPECS[source]), [NamedSharding(MESH, s) for s in SPECS.values()]
    by_jit = jax.jit(lambda x: [x] * 3, out_shardings=targets)(placed)
    by_device_put = [jax.device_put(placed, target) for target in targets]
    constrained = jax.jit(lambda x: lax.with_sharding_constraint([x + 1] * 3, targets))(placed)
    for results in (by_jit, by_device_put, constrained):
        for array, target in zip(results, targets, strict=True):
            assert array.sharding.is_equivalent_to(target, 2)
    check([by_jit, by_device_put, constrained], [[x] * 3, [x] * 3, [x + 1] * 3])


def test_constraints_back_and_forth() -> None:
    x = numbers((D, D))

    @jax.jit
    def f(x):
        for spec in (COLUMNS, ROWS, WHOLE, COLUMNS):
            x = lax.with_sharding_constraint(jnp.sin(x), NamedSharding(MESH, spec))
        return x

    def g(x):
        return jnp.sin(jnp.sin(jnp.sin(jnp.sin(x))))

    check(f(put(x)), local(g, x), 1e-5)


def test_explicit_axes() -> None:
    """The sharding is part of the types; `reshard` is in the program."""
    x, y = numbers((D, D)), numbers((D, D), seed=1)

    @jax.jit
    def f(x, y):
        z = jnp.einsum("ij,jk->ik", x, jax.sharding.reshard(y, P(None, None)))
        assert jax.typeof(z).sharding.spec == P("x", None)
        moved = jax.sharding.reshard(z, P(None, "x"))
        assert jax.typeof(moved).sharding.spec == P(None, "x")
        return moved, z.sum(0)

    with jax.set_mesh(MESH_EXPLICIT):
        got = f(put(x, P("x", None), MESH_EXPLICIT), put(y, P("x", None), MESH_EXPLICIT))
        summed = jax.jit(lambda x: jnp.einsum("ij->j", x, out_sharding=P("x")))(
            put(x, P("x", None), MESH_EXPLICIT)
        )
    check(got, (x @ y, (x @ y).sum(0)))
    check(summed, x.sum(0))


def test_operations_outside_of_jit() -> None:
    """Arrays over all ranks in ordinary expressions."""
    x = numbers((D, 4))
    a = put(x)
    check([a + 1, a.sum(), a.T @ a, a.max(0)], [x + 1, x.sum(), x.T @ x, x.max(0)])
    check(jnp.sort(a[:, 0]), np.sort(x[:, 0]))
    assert float(a.sum()) == x.sum()
    assert bool((a == a).all())


# --- Models --------------------------------------------------------------------------------------


def init_mlp(width: int = D) -> dict[str, np.ndarray]:
    return {"a": normal((width, 2 * width), 1) / 4, "b": normal((2 * width, width), 2) / 4}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_loss(params, x, y):
    return ((mlp(params, x) - y) ** 2).mean()


def mlp_step(params, x, y):
    loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), loss


def trained(x: np.ndarray, y: np.ndarray, steps: int) -> tuple[Any, Any]:
    params, loss = init_mlp(), None
    for _ in range(steps):
        params, loss = local(mlp_step, params, x, y)
    return params, loss


@pytest.mark.parametrize(
    ("style", "specs", "batch"),
    [
        ("data", {"a": P(), "b": P()}, P("x")),
        ("fsdp", {"a": P("x"), "b": P("x")}, P("x")),
        ("tensor", {"a": P(None, "x"), "b": P("x")}, P()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training(style: str, specs: dict[str, P], batch: P) -> None:
    """Three steps whose parameters are donated; several are in flight at once."""
    x, y = normal((D, D), 3), normal((D, D), 4)
    params = {name: put(value, specs[name]) for name, value in init_mlp().items()}
    out = ({name: NamedSharding(MESH, spec) for name, spec in specs.items()}, None)
    step = jax.jit(mlp_step, donate_argnums=0, out_shardings=out)
    here, there = put(x, batch), put(y, batch)
    loss = None
    for _ in range(3):
        before = params
        params, loss = step(params, here, there)
        assert all(p.is_deleted() for p in jax.tree.leaves(before))
    check((params, loss), trained(x, y, 3), 1e-4)


def test_data_parallel_by_shard_map_with_donation() -> None:
    x, y = normal((D, D), 3), normal((D, D), 4)

    def step(params, x, y):
        params = jax.tree.map(varying, params)
        loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        grads = lax.pmean(grads, "x")
        params = lax.pmean(params, "x")
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), lax.pmean(loss, "x")

    mapped_step = jax.jit(
        jax.shard_map(step, mesh=MESH, in_specs=(P(), P("x"), P("x")), out_specs=P()),
        donate_argnums=0,
    )
    params = jax.tree.map(partial(put, spec=P()), init_mlp())
    loss = None
    for _ in range(3):
        before = params
        params, loss = mapped_step(params, put(x), put(y))
        assert all(p.is_deleted() for p in jax.tree.leaves(before))
    check((params, loss), trained(x, y, 3), 1e-4)


def test_donation_of_what_a_collective_reads() -> None:
    """The result may lie where the operand was."""
    x = numbers((SIZE * 4, 5))

    def f(x, y):
        return lax.ppermute(x, "x", SHIFT), lax.psum(y, "x") + x

    donating = jax.jit(
        jax.shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x")), donate_argnums=(0, 1)
    )
    want = simulated(f, x, x + 1)
    for _ in range(3):
        a, b = put(x), put(x + 1)
        got = donating(a, b)
        assert a.is_deleted()
        assert b.is_deleted()
        check(got, want)


def attention(q, k, v, bias=0.0):
    scores = jnp.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1]) + bias
    return jnp.einsum("hst,thd->shd", jax.nn.softmax(scores, -1), v)


def test_sequence_parallel_attention_by_all_to_all() -> None:
    """Ulysses: from a sharded sequence to sharded heads and back."""
    q, k, v = (normal((2 * D, D, 4), i) for i in range(3))

    def f(*qkv):
        heads = [lax.all_to_all(x, "x", 1, 0, tiled=True) for x in qkv]
        return lax.all_to_all(attention(*heads), "x", 0, 1, tiled=True)

    check(mapped(f)(put(q), put(k), put(v)), local(attention, q, k, v), 1e-4)


def test_ring_attention() -> None:
    """Keys and values go round; the softmax is accumulated."""
    q, k, v = (normal((2 * D, 2, 4), i) for i in range(3))

    def f(q, k, v):
        def step(_, carry):
            k, v, top, norm, total = carry
            scores = jnp.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1])
            high = jnp.maximum(top, scores.max(-1))
            weights, old = jnp.exp(scores - high[..., None]), jnp.exp(top - high)
            norm = norm * old + weights.sum(-1)
            total = total * old.T[..., None] + jnp.einsum("hst,thd->shd", weights, v)
            k, v = lax.ppermute((k, v), "x", SHIFT)
            return k, v, high, norm, total

        heads, rows = q.shape[1], q.shape[0]
        top = varying(jnp.full((heads, rows), -jnp.inf))
        carry = (k, v, top, varying(jnp.zeros((heads, rows))), jnp.zeros_like(q))
        _, _, _, norm, total = lax.fori_loop(0, SIZE, step, carry)
        return total / norm.T[..., None]

    check(mapped(f)(put(q), put(k), put(v)), local(attention, q, k, v), 1e-4)


def test_attention_with_a_sharded_sequence_by_constraints() -> None:
    q, k, v = (normal((2 * D, 2, 4), i) for i in range(3))

    def f(q, k, v):
        k, v = lax.with_sharding_constraint((k, v), NamedSharding(MESH, P()))
        return lax.with_sharding_constraint(attention(q, k, v), NamedSharding(MESH, P("x")))

    def loss(q, k, v):
        return (f(q, k, v) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(put(q), put(k), put(v))
    want = local(jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2)), q, k, v)
    check(got, want, 1e-3)


def test_expert_parallel() -> None:
    """Tokens go to the rank of their expert and back."""
    tokens, experts = 4 * SIZE, normal((SIZE, 5, 5), 1)
    x = normal((SIZE * tokens, 5))
    choice = np.random.default_rng(0).integers(0, SIZE, SIZE * tokens)

    def f(x, choice, expert):
        one_hot = jax.nn.one_hot(choice, SIZE, dtype=jnp.int32)
        slot = (jnp.cumsum(one_hot, 0) * one_hot).sum(1) - 1
        sent = jnp.zeros((SIZE, tokens, 5)).at[choice, slot].set(x)
        here = lax.all_to_all(sent, "x", 0, 0)
        back = lax.all_to_all(jnp.tanh(here @ expert[0]), "x", 0, 0)
        return back[choice, slot]

    got = mapped(f)(put(x), put(choice.astype(np.int32)), put(experts))
    check(got, local(lambda: jnp.tanh(jnp.einsum("ti,tij->tj", x, experts[choice]))), 1e-4)


def test_pipeline() -> None:
    """A stage on each rank, as many micro-batches; forward and backward."""
    weights, x = normal((SIZE, 4, 4), 1) / 2, normal((5, 3, 4))

    def f(w, x):
        w, stage = w[0], lax.axis_index("x")

        def step(carry, t):
            first = x[jnp.clip(t, 0, len(x) - 1)]
            y = jnp.tanh(jnp.where(stage == 0, first, carry) @ w)
            return lax.ppermute(y, "x", SHIFT), y

        carry = varying(jnp.zeros(x.shape[1:]))
        _, out = lax.scan(step, carry, jnp.arange(len(x) + SIZE - 1))
        return lax.psum(jnp.where(stage == SIZE - 1, out[SIZE - 1 :], 0), "x")

    def reference(w, x):
        for i in range(SIZE):
            x = jnp.tanh(x @ w[i])
        return x

    piped = jax.shard_map(f, mesh=MESH, in_specs=(P("x"), P()), out_specs=P())
    check(jax.jit(piped)(put(weights), put(x, P())), local(reference, weights, x), 1e-4)
    got = jax.jit(jax.grad(lambda w, x: (piped(w, x) ** 2).sum()))(put(weights), put(x, P()))
    want = local(jax.grad(lambda w, x: (reference(w, x) ** 2).sum()), weights, x)
    check(got, want, 1e-4)


def test_halo_exchange() -> None:
    """Heat along a ring of blocks: ten steps in one program."""
    x = normal((SIZE * 5,))

    def f(x):
        def step(_, x):
            left = lax.ppermute(x[-1:], "x", SHIFT)
            right = lax.ppermute(x[:1], "x", [(b, a) for a, b in SHIFT])
            wide = jnp.concatenate([left, x, right])
            return x + 0.1 * (wide[2:] + wide[:-2] - 2 * x)

        return lax.fori_loop(0, 10, step, x)

    def reference(x):
        def step(_, x):
            return x + 0.1 * (jnp.roll(x, 1) + jnp.roll(x, -1) - 2 * x)

        return lax.fori_loop(0, 10, step, x)

    check(mapped(f)(put(x)), local(reference, x), 1e-5)


def test_conjugate_gradients() -> None:
    """A loop whose length the residual of all decides, on a sharded matrix."""
    a = normal((D, D))
    a, b = a @ a.T + D * np.eye(D, dtype=np.float32), normal((D,), 1)

    def f(a, b):
        return jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, tol=1e-6)[0]

    check(jax.jit(f)(put(a), put(b)), local(jnp.linalg.solve, a, b), 1e-3)


def test_gradient_and_hessian_of_a_sharded_loss() -> None:
    x, w = normal((D, 3)), normal((3,), 1)

    def loss(w, x):
        return jax.nn.softplus(x @ w).mean()

    def f(w, x):
        return jax.value_and_grad(loss)(w, x), jax.hessian(loss)(w, x)

    check(jax.jit(f)(put(w, P()), put(x)), local(f, w, x), 1e-5)


# --- pmap ----------------------------------------------------------------------------------------


def own(array: jax.Array) -> np.ndarray:
    """This rank's part of a result of `pmap`."""
    (shard,) = array.addressable_shards
    return np.asarray(shard.data)


def test_pmap_collectives() -> None:
    x = numbers((SIZE, 3, 4))

    @partial(jax.pmap, axis_name="i")
    def f(x):
        others = lax.all_gather(x, "i")
        moved = lax.ppermute(x, "i", SHIFT)
        return lax.psum(x, "i"), lax.pmax(x, "i"), moved, others, lax.axis_index("i")

    total, top, moved, others, index = map(own, f(x[RANK : RANK + 1]))
    np.testing.assert_array_equal(total.reshape(3, 4), x.sum(0))
    np.testing.assert_array_equal(top.reshape(3, 4), x.max(0))
    np.testing.assert_array_equal(moved.reshape(3, 4), x[RANK - 1])
    np.testing.assert_array_equal(others.reshape(x.shape), x)
    assert index.ravel().tolist() == [RANK]


def test_pmap_training_with_donation() -> None:
    x, y = normal((D, D), 3), normal((D, D), 4)
    step = D // SIZE
    mine = slice(RANK * step, (RANK + 1) * step)

    @partial(jax.pmap, axis_name="i", donate_argnums=0)
    def train(params, x, y):
        loss, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        grads = lax.pmean(grads, "i")
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), lax.pmean(loss, "i")

    params: Any = jax.tree.map(lambda p: p[None], init_mlp())
    loss = None
    for _ in range(3):
        params, loss = train(params, x[None, mine], y[None, mine])
    want, want_loss = trained(x, y, 3)
    for name, value in want.items():
        got = own(params[name]).reshape(value.shape)
        np.testing.assert_allclose(got, value, 1e-4, 1e-5)
    np.testing.assert_allclose(own(loss).ravel(), want_loss, 1e-4)


def test_pmap_without_collectives() -> None:
    got = jax.pmap(lambda x, y: x * y, in_axes=(0, None))(
        np.full((1, 3), RANK + 1.0), np.arange(3.0)
    )
    np.testing.assert_array_equal(own(got).ravel(), (RANK + 1) * np.arange(3))


# --- Meshes --------------------------------------------------------------------------------------

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


# --- Arrays over all ranks -----------------------------------------------------------------------


def test_device_put_from_the_host() -> None:
    x = numbers((D, 3))
    for spec in (P("x"), P()):
        array = jax.device_put(x, NamedSharding(MESH, spec))
        assert array.is_fully_replicated == (spec == P())
        assert array.is_fully_addressable == (SIZE == 1)
        check(array, x)
    with pytest.raises(RuntimeError, match="non-addressable"):
        np.asarray(jax.device_put(x, NamedSharding(MESH, P("x"))))


def test_arrays_from_local_parts() -> None:
    x = numbers((SIZE * 2, 3))
    mine = x[2 * RANK : 2 * RANK + 2]
    sharding = NamedSharding(MESH, P("x"))
    array = jax.make_array_from_process_local_data(sharding, mine)
    check(array, x)
    single = jax.device_put(mine, jax.local_devices()[0])
    check(jax.make_array_from_single_device_arrays(x.shape, sharding, [single]), x)
    check(jax.make_array_from_process_local_data(NamedSharding(MESH, P()), x), x)
    check(jax.jit(lambda a: a.sum(0))(array), x.sum(0))


def test_arrays_made_inside() -> None:
    sharding = NamedSharding(MESH, P("x"))
    check(jnp.zeros((D, 2), device=sharding), np.zeros((D, 2), np.float32))
    check(
        jax.jit(lambda: jnp.arange(D) * 2, out_shardings=sharding)(),
        np.arange(0, 2 * D, 2, np.int32),
    )
    check(jnp.ones_like(put(numbers((D, 2)))), np.ones((D, 2), np.float32))


def test_unequal_parts_are_refused_as_ever() -> None:
    if SIZE > 1:
        with pytest.raises(ValueError, match="evenly divide"):
            jax.device_put(np.arange(SIZE + 1.0), NamedSharding(MESH, P("x")))


def test_process_allgather() -> None:
    mine = {"a": numbers((3,), seed=RANK), "b": np.int32(RANK)}
    got = multihost_utils.process_allgather(mine)
    np.testing.assert_array_equal(got["a"], [numbers((3,), seed=r) for r in range(SIZE)])
    np.testing.assert_array_equal(got["b"], np.arange(SIZE))
    tiled = multihost_utils.process_allgather(mine["a"], tiled=True)
    np.testing.assert_array_equal(
        tiled, np.concatenate([numbers((3,), seed=r) for r in range(SIZE)])
    )
    x = numbers((D, 2))
    np.testing.assert_array_equal(multihost_utils.process_allgather(put(x), tiled=True), x)


def test_broadcast_one_to_all() -> None:
    mine = {"a": numbers((3,), seed=RANK), "b": np.full(2, RANK == 0), "c": np.uint8(RANK + 3)}
    got = multihost_utils.broadcast_one_to_all(mine)
    np.testing.assert_array_equal(got["a"], numbers((3,), seed=0))
    assert got["b"].all()
    assert got["c"] == 3
    last = multihost_utils.broadcast_one_to_all(np.float32(RANK), is_source=RANK == SIZE - 1)
    assert last == SIZE - 1


def test_synchronise_and_compare() -> None:
    for i in range(3):
        multihost_utils.sync_global_devices(f"here {i}")
    multihost_utils.assert_equal({"a": np.arange(3)}, "not equal")
    if SIZE > 1:
        with pytest.raises(AssertionError, match="they differ"):
            multihost_utils.assert_equal(np.float32(RANK), "they differ")


def test_host_local_to_global_and_back() -> None:
    x = numbers((SIZE * 2, 3))
    mine = x[2 * RANK : 2 * RANK + 2]
    array = multihost_utils.host_local_array_to_global_array(mine, MESH, P("x"))
    check(array, x)
    doubled = jax.jit(lambda a: a * 2)(array)
    back = multihost_utils.global_array_to_host_local_array(doubled, MESH, P("x"))
    np.testing.assert_array_equal(back, mine * 2)


# --- Compiled ahead of time ----------------------------------------------------------------------


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


# --- Several programs ----------------------------------------------------------------------------


def test_many_programs_in_flight() -> None:
    """None is waited for until all are dispatched."""
    x = numbers((SIZE * 2, 3))
    total = mapped(lambda x: lax.psum(x, "x"))
    turned = mapped(lambda x: lax.ppermute(x, "x", SHIFT))
    product = jax.jit(lambda x: x @ x.T)
    a = put(x)
    results = [(total(a * i), turned(a + i), product(a - i)) for i in range(30)]
    for i, (s, t, p) in reversed(list(enumerate(results))):
        check(s, np.tile((x * i).reshape(SIZE, 2, 3).sum(0), (SIZE, 1)))
        check(t, np.roll(x + i, 2, 0))
        check(p, (x - i) @ (x - i).T)


def test_a_chain_of_programs() -> None:
    x = numbers((SIZE * 2, 3))
    a = put(x)
    step = mapped(lambda x: lax.ppermute(x, "x", SHIFT) + 1)
    for _ in range(3 * SIZE):
        a = step(a)
    check(a, x + 3 * SIZE)


def test_programs_of_one_device_between() -> None:
    x = numbers((SIZE, 3))
    total = mapped(lambda x: lax.psum(x, "x"))
    for i in range(5):
        y = jnp.sin(jnp.arange(3.0) * RANK)
        got = total(put(x + i))
        z = jnp.cos(y)
        check(got, np.tile((x + i).sum(0), (SIZE, 1)))
        np.testing.assert_allclose(z, np.cos(np.sin(np.arange(3.0) * RANK)), 1e-4)


def test_results_dropped_before_they_are_there() -> None:
    x = put(numbers((SIZE, 100)))
    f = mapped(lambda x: lax.fori_loop(0, 20, lambda _, y: lax.ppermute(y, "x", SHIFT), x))
    for _ in range(10):
        f(x)
    check(
        mapped(lambda x: lax.psum(x, "x"))(x),
        simulated(lambda x: lax.psum(x, "x"), numbers((SIZE, 100))),
    )


def test_larger_arrays() -> None:
    """4 MiB per rank, beyond what MPI sends eagerly."""
    x = np.arange(SIZE * D * 1024 * 32, dtype=np.float32).reshape(SIZE * D, -1) % 97

    def f(x):
        moved = lax.ppermute(x, "x", SHIFT)
        exchanged = lax.all_to_all(x, "x", 0, 1, tiled=True)
        return lax.psum(x, "x"), moved, lax.psum_scatter(x, "x", tiled=True), exchanged

    same(f, x)


def test_a_thread_waits_while_another_dispatches() -> None:
    x = numbers((SIZE, 3))
    f = mapped(lambda x: lax.psum(x, "x"))
    got = [f(put(x + i)) for i in range(8)]
    thread = threading.Thread(target=lambda: jax.block_until_ready(got))
    thread.start()
    more = [f(put(x - i)) for i in range(8)]
    thread.join()
    for i in range(8):
        check(got[i], np.tile((x + i).sum(0), (SIZE, 1)))
        check(more[i], np.tile((x - i).sum(0), (SIZE, 1)))


# --- Callbacks -----------------------------------------------------------------------------------


def test_debug_callback() -> None:
    """Each rank's host sees its own part."""
    seen: list[Any] = []

    def f(x):
        jax.debug.callback(lambda i, v: seen.append((int(i), v.tolist())), lax.axis_index("x"), x)
        y = lax.psum(x, "x")
        jax.debug.callback(lambda v: seen.append(v.tolist()), y)
        return y

    x = numbers((SIZE, 3))
    check(mapped(f)(put(x)), np.tile(x.sum(0), (SIZE, 1)))
    jax.effects_barrier()
    assert sorted(seen, key=str) == sorted(
        [(RANK, [x[RANK].tolist()]), [x.sum(0).tolist()]], key=str
    )


def test_debug_print(capfd: pytest.CaptureFixture[str]) -> None:
    def f(x):
        jax.debug.print("rank {} has {}", lax.axis_index("x"), x[0])
        return x

    jax.block_until_ready(mapped(f)(put(np.arange(float(SIZE), dtype=np.float32))))
    jax.effects_barrier()
    assert f"rank {RANK} has {float(RANK)}" in capfd.readouterr().out


def test_pure_callback() -> None:
    def f(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        y = jax.pure_callback(lambda v: np.asarray(v) * 2, shape, lax.ppermute(x, "x", SHIFT))
        return lax.psum(y, "x") + y

    x = numbers((SIZE * 2, 3))
    want = simulated(lambda x: lax.psum(x * 2, "x") + lax.ppermute(x * 2, "x", SHIFT), x)
    check(mapped(f, check_vma=False)(put(x)), want)


def test_pure_callback_in_a_loop() -> None:
    def f(x):
        def body(_, y):
            y = jax.pure_callback(
                lambda v: np.asarray(v) + 1, jax.ShapeDtypeStruct(y.shape, y.dtype), y
            )
            return lax.ppermute(y, "x", SHIFT)

        return lax.fori_loop(0, 2 * SIZE, body, x)

    x = numbers((SIZE * 2, 3))
    check(mapped(f, check_vma=False)(put(x)), x + 2 * SIZE)


@pytest.mark.parametrize("ordered", [False, True])
def test_io_callback(ordered: bool) -> None:
    seen: list[float] = []

    def note(v: Any) -> np.ndarray:
        seen.append(float(np.asarray(v).sum()))
        return np.float32(len(seen))

    def f(x):
        total = lax.psum(x, "x")
        first = io_callback(note, jax.ShapeDtypeStruct((), np.float32), x, ordered=ordered)
        return total + lax.pmax(first, "x")

    x = numbers((SIZE, 3))
    got = mapped(f, check_vma=False)(put(x))
    check(got, np.tile(x.sum(0) + 1, (SIZE, 1)))
    jax.effects_barrier()
    assert seen == [float(x[RANK].sum())]


def test_pure_callback_on_replicated_arrays() -> None:
    """Partitioned by XLA: the host function sees the whole array."""

    def f(x):
        y = lax.with_sharding_constraint(x, NamedSharding(MESH, P()))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.asarray(v)[::-1] * 2, shape, y).sum(0) + x.sum(0)

    x = numbers((D, 3))
    check(jax.jit(f)(put(x)), 3 * x.sum(0))


def test_callback_that_computes_with_jax() -> None:
    def host(v: Any) -> np.ndarray:
        return np.asarray(jnp.sin(jnp.asarray(np.asarray(v))))

    def f(x):
        return lax.psum(jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "x")

    x = normal((SIZE, 3))
    check(mapped(f, check_vma=False)(put(x)), np.tile(np.sin(x).sum(0), (SIZE, 1)), 1e-5)


def test_callback_error_names_the_function() -> None:
    def bad(v: Any) -> np.ndarray:
        raise ValueError("not today")

    def f(x):
        return jax.pure_callback(bad, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(Exception, match="not today"):
        jax.block_until_ready(mapped(f, check_vma=False)(put(numbers((SIZE, 3)))))


# --- Other transformations -----------------------------------------------------------------------


def test_nested_shard_map_in_jit_with_other_work() -> None:
    x = numbers((D, D))
    inner = jax.shard_map(
        lambda x: lax.ppermute(x, "x", SHIFT), mesh=MESH, in_specs=P("x"), out_specs=P("x")
    )

    def f(x):
        y = (x @ x.T).sum(0, keepdims=True) + x
        z = inner(y)
        return jnp.sort(z, 0), z.mean(1)

    step = D // SIZE
    want = np.roll((x @ x.T).sum(0, keepdims=True) + x, step, 0)
    check(jax.jit(f)(put(x)), (np.sort(want, 0), want.mean(1)), 1e-6)


def test_vmap_of_shard_map() -> None:
    x = numbers((3, SIZE * 2, 4))
    inner = jax.shard_map(
        lambda x: x + lax.psum(x, "x"), mesh=MESH, in_specs=P("x"), out_specs=P("x")
    )
    got = jax.jit(jax.vmap(inner))(put(x, P(None, "x")))
    blocks = x.reshape(3, SIZE, 2, 4)
    check(got, (blocks + blocks.sum(1, keepdims=True)).reshape(x.shape))


def test_spmd_axis_name() -> None:
    x, w = numbers((D, 4)), numbers((4, 4), seed=1)

    def f(row):
        row = lax.with_sharding_constraint(row @ w, NamedSharding(MESH, P(None)))
        return row / 2

    check(jax.jit(jax.vmap(f, spmd_axis_name="x"))(put(x)), x @ w / 2)


def test_exported() -> None:
    x = numbers((D, 3))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, ROWS))
    exported = export.export(jax.jit(lambda x: x - x.sum(0)))(shape)
    assert exported.nr_devices == SIZE
    check(jax.jit(exported.call)(put(x)), x - x.sum(0))
