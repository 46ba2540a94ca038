"""How much of the communication of a data-parallel step is hidden behind its computation.

Usage: mpirun -n 2 python hidden.py [lm|mlp] [LAYERS [WIDTH [PIECES]]]
Milliseconds of a step of examples/train_lm.py, or of a perceptron of square layers, for all ranks
and for the own device alone with as much to compute: the least and the median. Run it with
MPI_CUDA_OVERLAP=0 and with 1, in turn, on nodes with a network between them. Of the difference
between a step and the computation with 0, the share that is missing with 1 is hidden.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_lm

CONTEXT, STEPS = 64, 16
KIND = sys.argv[1] if len(sys.argv) > 1 else "lm"
LAYERS, WIDTH, PIECES = [*map(int, sys.argv[2:]), *(4, 512, 16)[len(sys.argv[2:]) :]]


def language_model(mesh: Mesh):
    """The step, its state and its batch, with so many pieces for each device."""
    model = train_lm.Model(64, LAYERS, WIDTH, 8, CONTEXT, "float32")
    state = train_lm.initial_state(model, mesh, 0)
    rows = np.arange(PIECES * mesh.size * (CONTEXT + 1)).reshape(-1, CONTEXT + 1) * 7919 % 64
    batch = put(rows.astype(np.int32), NamedSharding(mesh, P("data")))
    return partial(train_lm.train_step, model, 1e-3, 1000), state, batch


def perceptron(mesh: Mesh):
    """The same of a perceptron."""

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(weights, x):
        value, grads = jax.value_and_grad(loss)(weights, x)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], value

    rng = np.random.default_rng(0)
    everywhere = NamedSharding(mesh, P())
    draw = partial(rng.standard_normal, dtype=np.float32)
    weights = [put(draw((WIDTH, WIDTH)) / WIDTH**0.5, everywhere) for _ in range(LAYERS)]
    rows = draw((PIECES * CONTEXT * mesh.size, WIDTH))
    return step, weights, put(rows, NamedSharding(mesh, P("data")))


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Timed:
    """Steps on a mesh, one at a time."""

    def __init__(self, devices: list):
        mesh = Mesh(np.array(devices).reshape(-1, 1), ("data", "model"))
        step, self.state, self.batch = (language_model if KIND == "lm" else perceptron)(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.step = jax.jit(
            step,
            in_shardings=(shardings, self.batch.sharding),
            out_shardings=(shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
        )
        self.times: list[float] = []

    def __call__(self) -> None:
        begin = time.perf_counter()
        self.state, loss = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, loss))
        self.times.append((time.perf_counter() - begin) * 1e3)

    def __str__(self) -> str:
        return f"{min(self.times[2:]):.1f} ({statistics.median(self.times[2:]):.1f})"


every, alone = Timed(jax.devices()), Timed(jax.local_devices())
for _ in range(STEPS):
    every()
    alone()
if jax.process_index() == 0:
    count = sum(x.size for x in jax.tree.leaves(every.state)) // (3 if KIND == "lm" else 1)
    print(f"{KIND}: {count * 4 / 1e6:.1f} MB of gradients, step {every}, computation {alone}")
