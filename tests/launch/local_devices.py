"""What `test_local_devices.py` runs on every rank: each collective, compared with numpy."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_enable_x64", True)
rank, count, local = jax.process_index(), jax.device_count(), jax.local_device_count()
devices = np.array(jax.devices())


def put(whole: np.ndarray, mesh: Mesh, *spec: Any) -> jax.Array:
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def same(found: jax.Array, want: Any) -> None:
    want = np.asarray(want)
    assert found.shape == want.shape, (found.shape, want.shape)
    for shard in found.addressable_shards:
        part = np.asarray(shard.data).astype(want.dtype)
        np.testing.assert_allclose(part, want[shard.index], rtol=1e-6)


def on(mesh: Mesh, body: Callable, ins: Any, outs: Any) -> Callable:
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False))


def the_devices_are_those_of_the_ranks() -> None:
    assert [d.process_index for d in jax.devices()] == [i // local for i in range(count)]
    assert [d.id for d in jax.local_devices()] == [rank * local + i for i in range(local)]
    assert [d.local_hardware_id for d in jax.local_devices()] == list(range(local))
    for device in jax.local_devices():
        x = jax.device_put(np.arange(3.0) + device.id, device)
        y = jax.jit(lambda x: 2 * x)(x)
        assert x.device == y.device == device
        np.testing.assert_array_equal(y, 2 * (np.arange(3.0) + device.id))
        moved = jax.device_put(y, jax.local_devices()[0])
        np.testing.assert_array_equal(moved, y)


def one_axis(order: np.ndarray, dtype: str) -> None:
    mesh, n = Mesh(order, ("d",)), order.size
    whole = (np.arange(2 * n * n).reshape(n * n, 2) % 3 + 1).astype(jnp.dtype(dtype))
    blocks, x = whole.reshape(n, n, 2), put(whole, mesh, "d")
    ring = [(i, (i + 1) % n) for i in range(n)]
    some = [(0, n - 1), (n - 1, 1), (1, 0)]
    moved = np.zeros_like(blocks)
    for source, target in some:
        moved[target] = blocks[source]
    turned = [[blocks[j, i : i + 1] for j in range(n)] for i in range(n)]
    rows = np.concatenate([np.concatenate(row, 1) for row in turned])
    flat = whole.shape

    def is_(body: Callable, outs: Any, want: np.ndarray) -> None:
        same(on(mesh, body, P("d"), outs)(x), want)

    is_(lambda x: lax.all_gather(x, "d", tiled=True), P(), whole)
    columns = np.concatenate(list(blocks), 1)
    is_(lambda x: lax.all_gather(x, "d", axis=1, tiled=True), P(), columns)
    transposed = blocks.transpose(1, 0, 2).reshape(flat)
    is_(lambda x: lax.all_to_all(x, "d", 0, 0, tiled=True), P("d"), transposed)
    is_(lambda x: lax.all_to_all(x, "d", 0, 1, tiled=True), P("d"), rows)
    is_(lambda x: lax.ppermute(x, "d", ring), P("d"), np.roll(blocks, 1, 0).reshape(flat))
    is_(lambda x: lax.ppermute(x, "d", some), P("d"), moved.reshape(flat))
    if dtype == "bool":
        return
    sums = blocks.astype(np.complex128 if dtype == "complex64" else np.float64).sum(0)
    is_(lambda x: lax.psum(x, "d").astype(sums.dtype), P(), sums)
    scattered = lax.psum_scatter
    is_(lambda x: scattered(x, "d", tiled=True).astype(sums.dtype), P("d"), sums)
    if dtype != "complex64":
        is_(lambda x: lax.pmax(x, "d"), P(), blocks.max(0))
        is_(lambda x: lax.pmin(x, "d"), P(), blocks.min(0))


def two_axes(grid: np.ndarray) -> None:
    """Groups within a rank, groups of one device of each rank, and loops of unknown length."""
    mesh, (a, b) = Mesh(grid, ("a", "b")), grid.shape
    whole = np.arange(4.0 * a * b).reshape(a, 4 * b)
    x, cut = put(whole, mesh, "a", "b"), whole.reshape(a, b, 4)
    ring = [(i, (i + 1) % b) for i in range(b)]

    def is_(body: Callable, outs: Any, want: np.ndarray) -> None:
        same(on(mesh, body, P("a", "b"), outs)(x), want)

    def loop(x: jax.Array) -> jax.Array:
        def body(state: tuple) -> tuple:
            i, y = state
            return i + 1, y + 0.1 * lax.psum(y, "a") + lax.ppermute(y, "b", ring)

        def goes_on(state: tuple) -> jax.Array:
            return (state[0] < 5) & (lax.pmax(jnp.max(state[1]), ("a", "b")) < 1e6)

        return lax.while_loop(goes_on, body, (0, x))[1]

    looped = cut
    for _ in range(5):
        if looped.max() < 1e6:
            looped = looped + 0.1 * looped.sum(0, keepdims=True) + np.roll(looped, 1, 1)
    is_(lambda x: lax.psum(x, "a"), P(None, "b"), whole.sum(0, keepdims=True))
    is_(lambda x: lax.psum(x, "b"), P("a"), cut.sum(1))
    is_(lambda x: lax.psum(x, ("a", "b")), P(), cut.sum((0, 1))[None])
    is_(lambda x: lax.all_gather(x, "b", axis=1, tiled=True), P("a"), whole)
    is_(lambda x: lax.all_gather(x, "a", tiled=True), P(None, "b"), whole)
    is_(loop, P("a", "b"), looped.reshape(whole.shape))


def partitioned(shardy: bool) -> None:
    jax.config.update("jax_use_shardy_partitioner", shardy)
    mesh, rng = Mesh(devices, ("d",)), np.random.default_rng(0)
    a, w = rng.normal(size=(8 * count, 16)), rng.normal(size=(16, 4 * count))
    x, y = put(a, mesh, "d"), put(w, mesh, None, "d")
    everywhere, columns = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "d"))

    def several(x: jax.Array, y: jax.Array) -> tuple:
        return x @ y, (x @ y).sum(), jnp.sort(x, 0), x.T @ x

    found = jax.jit(several, out_shardings=everywhere)(x, y)
    for one, want in zip(found, (a @ w, (a @ w).sum(), np.sort(a, 0), a.T @ a), strict=True):
        same(one, want)
    slope = jax.grad(lambda w, x: ((x @ w) ** 2).sum())
    same(jax.jit(slope, out_shardings=columns)(y, x), 2 * a.T @ (a @ w))


def parts_of_the_devices() -> None:
    parts = [devices[::local], devices[1::local], devices[[0, -1]], devices[: local + 1]]
    for part in [*parts, np.array(jax.local_devices())]:
        mesh, whole = Mesh(part, ("d",)), np.arange(3.0 * part.size).reshape(-1, 3)
        same(
            on(mesh, lambda x: lax.psum(x, "d"), P("d"), P())(put(whole, mesh, "d")),
            whole.sum(0, keepdims=True),
        )
    # One rank with all of its devices, and another one with one.
    one_axis(devices[: local + 1], "float32")


def the_rest() -> None:
    mesh = Mesh(devices, ("d",))
    whole = np.arange(2.0 * count).reshape(count, 2)
    pairs = [[i, count - 1 - i] for i in range(count // 2)]
    paired = on(mesh, lambda x: lax.psum(x, "d", axis_index_groups=pairs), P("d"), P("d"))
    same(paired(put(whole, mesh, "d")), whole + whole[::-1])
    same(on(mesh, lambda: lax.axis_index("d")[None], (), P("d"))(), np.arange(count))

    def mean(x: jax.Array) -> jax.Array:
        return x / 2 + lax.psum(x, "d") / (2 * count)

    step = jax.jit(
        jax.shard_map(mean, mesh=mesh, in_specs=P("d"), out_specs=P("d")), donate_argnums=0
    )
    x, want = put(whole, mesh, "d"), whole
    # Many launches in flight, each of which takes what the one before gave.
    for _ in range(100):
        old, x = x, step(x)
        want = want / 2 + want.sum(0, keepdims=True) / (2 * count)
        assert old.is_deleted()
    same(x, want)
    numbers = np.arange(rank * local, rank * local + local, dtype=np.float32)
    summed = jax.pmap(lambda x: lax.psum(x, "i"), axis_name="i")(numbers)
    assert all(np.asarray(s.data) == sum(range(count)) for s in summed.addressable_shards)

    def twice(x: np.ndarray) -> np.ndarray:
        return 2 * x

    def called(x: jax.Array) -> jax.Array:
        return lax.psum(jax.pure_callback(twice, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "d")

    same(on(mesh, called, P("d"), P())(put(whole, mesh, "d")), 2 * whole.sum(0, keepdims=True))


def along_one_axis() -> None:
    the_devices_are_those_of_the_ranks()
    one_axis(devices, "float32")
    one_axis(devices[::-1], "bfloat16")
    by_place = devices.reshape(-1, local).T.ravel()
    for dtype in ("bool", "int8", "complex64"):
        one_axis(by_place, dtype)


def along_two_axes() -> None:
    for grid in (devices.reshape(-1, local), devices.reshape(-1, local).T):
        two_axes(grid)
    parts_of_the_devices()


def the_partitioners() -> None:
    the_rest()
    partitioned(False)
    partitioned(True)


PARTS = {part.__name__: part for part in (along_one_axis, along_two_axes, the_partitioners)}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
    print(f"has seen {count}\n", end="", flush=True)
