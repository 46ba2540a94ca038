"""Several programs in flight, one after the other, and from threads."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
from collectives_support import RANK, SHIFT, SIZE, D, check, mapped, numbers, put, same, simulated
from jax import lax


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
