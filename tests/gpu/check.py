"""What a GPU must show: operations and collectives on its memory against numpy.

Usage: mpirun -n 2 python tests/gpu/check.py REPORT.json [NAME...]

Needs no more than JAX and numpy. Rank 0 prints a line for each check and writes the report; a check
that fails does not end the others, unless ranks would wait for each other. With names, only those
run.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
RIGHT, LEFT = (RANK + 1) % SIZE, (RANK - 1) % SIZE
MESH = Mesh(np.array(jax.devices()), ("i",))
#: Elements: none, few, a chunk and a bit, several chunks.
LENGTHS = [0, 1, 1000, 300_001, 3_000_000]
DTYPES = ["float32", "int32", "bfloat16", "uint8", "complex64"]

CHECKS: list[tuple[str, Callable[[], Any]]] = []
Check = Callable[[], Any]


def check(function: Check) -> Check:
    """Adds `function`, which fails by raising, and may return what it found."""
    CHECKS.append((function.__name__.replace("_", " "), function))
    return function


def values(rank: int, length: int, dtype: str, rows: int = 1) -> np.ndarray:
    """Small whole numbers, other ones on each rank."""
    numbers = np.arange(rows * length).reshape(rows, length) % 7 + rank
    return numbers.astype(jnp.dtype(dtype))


def same(got: Any, want: np.ndarray) -> None:
    """Equal, bit by bit."""
    np.testing.assert_array_equal(np.asarray(got), want)


def everywhere(length: int, dtype: str, rows: int = 1) -> list[np.ndarray]:
    """What each rank has."""
    return [values(rank, length, dtype, rows) for rank in range(SIZE)]


@check
def devices() -> dict[str, Any]:
    assert jax.process_count() == SIZE and len(jax.devices()) == SIZE
    assert len(jax.local_devices()) == 1
    assert jax.local_devices()[0].process_index == RANK
    return {"platform": jax.local_devices()[0].platform, "kind": jax.local_devices()[0].device_kind}


def each(body: Callable[[int, str], None]) -> None:
    """`body` for every length and dtype."""
    for dtype in DTYPES:
        for length in LENGTHS:
            body(length, dtype)


@check
def reductions() -> None:
    def body(length: int, dtype: str) -> None:
        total = functools.reduce(np.add, everywhere(length, dtype))
        x = jnp.asarray(values(RANK, length, dtype))
        same(nt.allreduce(x, m.SUM), total)
        before = functools.reduce(np.add, everywhere(length, dtype)[: RANK + 1])
        same(nt.scan(x, m.SUM), before)
        reduced = nt.reduce(x, m.SUM, 0)
        same(reduced, total if RANK == 0 else np.asarray(x))
        blocks = functools.reduce(np.add, everywhere(length, dtype, SIZE))
        mine = nt.reduce_scatter(jnp.asarray(values(RANK, length, dtype, SIZE)), m.SUM)
        same(mine, blocks[RANK])

    each(body)


@check
def movements() -> None:
    def body(length: int, dtype: str) -> None:
        x = jnp.asarray(values(RANK, length, dtype)[0])
        all_rows = np.concatenate(everywhere(length, dtype))
        same(nt.allgather(x), all_rows)
        same(nt.bcast(x, SIZE - 1), all_rows[SIZE - 1])
        rows = jnp.asarray(values(RANK, length, dtype, SIZE))
        same(nt.alltoall(rows), np.stack([r[RANK] for r in everywhere(length, dtype, SIZE)]))
        gathered = nt.gather(x, 0)
        same(gathered, all_rows if RANK == 0 else np.asarray(x))
        scattered = nt.scatter(rows if RANK == 0 else x, 0)
        same(scattered, everywhere(length, dtype, SIZE)[0][RANK])

    each(body)


@check
def messages() -> None:
    def body(length: int, dtype: str) -> None:
        x = jnp.asarray(values(RANK, length, dtype)[0])
        left = values(LEFT, length, dtype)[0]
        same(nt.sendrecv(x, x, source=LEFT, dest=RIGHT), left)
        if RANK % 2 == 0:
            nt.send(x, RIGHT)
            same(nt.recv(x, LEFT), left)
        else:
            same(nt.recv(x, LEFT), left)
            nt.send(x, RIGHT)

    if SIZE % 2 == 0:
        each(body)


@check
def order_with_kernels() -> None:
    """Operands are still being computed, and results are used at once."""

    @jax.jit
    def program(x):
        for _ in range(5):
            x = jnp.tanh(x @ x.T) * 0.25
            x = nt.allreduce(x, m.SUM) / SIZE
            x = nt.sendrecv(x + RANK, x, source=LEFT, dest=RIGHT) - LEFT
        return x

    x = np.linspace(-1, 1, 700 * 700, dtype=np.float32).reshape(700, 700) / 10
    want = x
    for _ in range(5):
        want = np.tanh(want @ want.T) * np.float32(0.25)
    for _ in range(3):
        np.testing.assert_allclose(program(jnp.asarray(x)), want, atol=2e-4)


@check
def loops_and_branches() -> None:
    @jax.jit
    def program(x):
        def body(i, x):
            return lax.cond(i % 2 == 0, lambda x: nt.allreduce(x, m.SUM) / SIZE, lambda x: x + 1, x)

        return lax.fori_loop(0, 10, body, x)

    same(program(jnp.zeros(100_000)), np.full(100_000, 5, np.float32))


@check
def what_was_just_dispatched_has_a_place() -> None:
    """Bare, the plugin of a GPU ends the process if it is asked before the launch has begun."""
    program = jax.jit(lambda x: nt.allreduce(x @ x, m.SUM))
    x = jnp.eye(256)
    for _ in range(5):
        assert program(x).unsafe_buffer_pointer()


@check
def errors_have_names() -> None:
    try:
        np.asarray(nt.sendrecv(jnp.ones(500_000), jnp.ones(3), source=LEFT, dest=RIGHT))
    except Exception as error:
        assert "2000000 bytes" in str(error), error
        return
    raise AssertionError("a message that does not fit was accepted")


def mapped(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` of each device's part."""
    return jax.jit(
        jax.shard_map(body, mesh=MESH, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    )


def spread(rows: np.ndarray) -> jax.Array:
    """An array whose first axis is spread over the devices."""
    sharding = NamedSharding(MESH, P("i"))
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def part(array: jax.Array) -> np.ndarray:
    """This rank's."""
    return np.asarray(array.addressable_shards[0].data)


@check
def collectives() -> None:
    for length in (12, 120_000):
        rows = np.stack([values(rank, length, "float32")[0] for rank in range(SIZE)])
        x = spread(rows)
        same(part(mapped(lambda x: lax.psum(x, "i"))(x))[0], rows.sum(0))
        same(part(mapped(lambda x: lax.pmax(x, "i"))(x))[0], rows.max(0))
        same(part(mapped(lambda x: lax.all_gather(x[0], "i"))(x)), rows)
        ring = [(i, (i + 1) % SIZE) for i in range(SIZE)]
        same(part(mapped(lambda x: lax.ppermute(x, "i", ring))(x))[0], rows[LEFT])
        scattered = mapped(lambda x: lax.psum_scatter(x[0], "i", tiled=True))(x)
        same(part(scattered), np.split(rows.sum(0), SIZE)[RANK])
        swapped = mapped(lambda x: lax.all_to_all(x.reshape(SIZE, -1), "i", 0, 0))(x)
        same(part(swapped), np.stack([np.split(row, SIZE)[RANK] for row in rows]))
        same(part(mapped(lambda x: lax.axis_index("i")[None] + x[0, :1] * 0)(x)), [RANK])


@check
def partitioned_training() -> None:
    """A step of training whose batch is spread, against the same on this device alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = [jax.random.normal(k, (64, 64)) * 0.1 for k in keys]
    batch = np.random.default_rng(0).normal(size=(SIZE * 32, 64)).astype(np.float32)

    def step(params, x):
        def loss(params):
            h = x
            for w in params:
                h = jnp.tanh(h @ w)
            return jnp.mean(h**2)

        value, grads = jax.value_and_grad(loss)(params)
        return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value

    replicated = NamedSharding(MESH, P())
    shared = [
        jax.make_array_from_callback(w.shape, replicated, np.asarray(w).__getitem__) for w in params
    ]
    for _ in range(3):
        params, want = jax.jit(step)(params, jnp.asarray(batch))
        shared, value = jax.jit(step)(shared, spread(batch))
        np.testing.assert_allclose(part(value), want, rtol=1e-3)
    np.testing.assert_allclose(part(shared[0]), params[0], atol=1e-3)


def main() -> int:
    report: dict[str, Any] = {"jax": jax.__version__, "ranks": SIZE, "checks": {}}
    wrong = 0
    unknown = set(sys.argv[2:]) - {name for name, _ in CHECKS}
    if unknown:
        sys.exit(f"no such check: {sorted(unknown)}")
    chosen = [c for c in CHECKS if not sys.argv[2:] or c[0] in sys.argv[2:]]
    for name, function in chosen:
        start = time.perf_counter()
        try:
            result, text = function(), None
        except Exception:
            result, text = None, traceback.format_exc()
        wrong += text is not None
        taken = round(time.perf_counter() - start, 2)
        report["checks"][name] = {"failed": text, "measured": result, "seconds": taken}
        if text is not None:
            print(f"rank {RANK}: {name} failed:\n{text}", flush=True)
        elif RANK == 0:
            print(f"{name}: ok ({taken} s) {result or ''}", flush=True)
    if RANK == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(report, file, indent=1)
        print(f"{len(chosen) - wrong} passed, {wrong} failed", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
