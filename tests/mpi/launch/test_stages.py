"""Different programs on different ranks: the stages of a model, each on a mesh of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as nt

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
HALF = SIZE // 2
STEPS, RATE = 4, 0.2


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stage(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def loss(w: jax.Array, hidden: jax.Array, y: jax.Array) -> jax.Array:
    return ((hidden @ w - y) ** 2).mean()


def trained_by_one(x: np.ndarray, y: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    def whole(weights, x, y):
        return loss(weights[1], stage(weights[0], x), y)

    device = jax.local_devices()[0]
    weights, x, y = jax.device_put((weights, x, y), device)
    for _ in range(STEPS):
        grads = jax.jit(jax.grad(whole))(weights, x, y)
        weights = jax.tree.map(lambda w, g: w - RATE * g, weights, grads)
    return [np.asarray(w) for w in weights]


@pytest.mark.skipif(SIZE % 2 == 1, reason="needs two halves")
def test_a_pipeline_of_two_meshes() -> None:
    """The lower half of the ranks has the first stage and the upper half the second, each with the
    batch divided among its ranks. Activations and their cotangents are messages between the two."""
    is_first = RANK < HALF
    members = np.arange(HALF) + (0 if is_first else HALF)
    peer = RANK + HALF if is_first else RANK - HALF
    mesh = Mesh(np.array(jax.devices())[members], ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def divided(whole: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(whole.shape, rows, lambda index: whole[index])

    def joined(part: jax.Array) -> jax.Array:
        shape = (part.shape[0] * HALF, *part.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, rows, [part])

    def part(array: jax.Array) -> jax.Array:
        return array.addressable_data(0)

    x, y = normal(3 * HALF, 4, seed=1), normal(3 * HALF, 2, seed=2)
    weights = [normal(4, 5, seed=3), normal(5, 2, seed=4)]
    own = weights[0 if is_first else 1]
    w = jax.make_array_from_callback(own.shape, everywhere, lambda index: own[index])
    template = jnp.zeros((3, 5), jnp.float32)

    @jax.jit
    def backward(w, x, cotangent):
        (grad,) = jax.vjp(lambda w: stage(w, x), w)[1](cotangent)
        return w - RATE * grad

    @jax.jit
    def last(w, hidden, y):
        grad, cotangent = jax.grad(loss, (0, 1))(w, hidden, y)
        return w - RATE * grad, cotangent

    for step in range(STEPS):
        if is_first:
            batch = divided(x)
            nt.send(part(jax.jit(stage)(w, batch)), peer, tag=step)
            w = backward(w, batch, joined(nt.recv(template, peer, tag=step)))
        else:
            hidden = joined(nt.recv(template, peer, tag=step))
            w, cotangent = last(w, hidden, divided(y))
            nt.send(part(cotangent), peer, tag=step)
    want = trained_by_one(x, y, weights)[0 if is_first else 1]
    np.testing.assert_allclose(part(w), want, 1e-5, 1e-6)
