"""Seconds by the clock, and of a processor, to compile a training step for two devices: by the
inner plugin alone, and through us.

JAX_PLATFORMS=mpi_cuda,inner mpirun -n 2 python compile.py [LAYERS ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def inner_devices() -> list[jax.Device]:
    """Two devices of the inner plugin without us."""
    import xla_plugins.xla_cpu_pjrt as wheel

    path = next(Path(folder) / "xla_cpu_pjrt.so" for folder in wheel.__path__)
    if "inner" not in xla_bridge._backend_factories:
        xla_bridge.register_plugin("inner", library_path=str(path), options={"cpu_device_count": 2})
    return jax.devices("inner")


def seconds(devices: list[jax.Device], layers: int) -> np.ndarray:
    """To compile, without tracing: by the clock and of a processor."""
    mesh = Mesh(np.array(devices), ("data",))
    width = 128

    def loss(params, x):
        for first, second in params:
            x = x + jax.nn.gelu(x @ first) @ second
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jnp.mean(x**2)

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = [
        (
            jax.ShapeDtypeStruct((width, 4 * width), np.float32, sharding=whole),
            jax.ShapeDtypeStruct((4 * width, width), np.float32, sharding=whole),
        )
        for _ in range(layers)
    ]
    x = jax.ShapeDtypeStruct((64, width), np.float32, sharding=rows)
    lowered = jax.jit(step, donate_argnums=0).lower(params, x)
    start, busy = time.perf_counter(), time.process_time()
    lowered.compile()
    return np.array([time.perf_counter() - start, time.process_time() - busy])


def main() -> None:
    """Alternates, and prints medians."""
    for layers in map(int, sys.argv[1:] or ["2", "8"]):
        ours, bare = [], []
        for _ in range(3):
            bare.append(seconds(inner_devices(), layers))
            ours.append(seconds(jax.devices("mpi_cuda"), layers))
        if jax.process_index() == 0:
            alone, through = np.median(bare, 0), np.median(ours, 0)
            print(f"{layers} layers: {alone.round(2)}, through us {through.round(2)}", flush=True)


if __name__ == "__main__":
    main()
