"""`jit(x + 1)` through this process's backend, in microseconds per call.

With `--bare` the inner plugin is registered without us. scripts/bench_dispatch pairs the two.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp

if "--bare" in sys.argv:
    import xla_plugins.xla_cpu_pjrt as wheel
    from jax._src import xla_bridge

    path = str(wheel.__path__[0]) + "/xla_cpu_pjrt.so"
    xla_bridge.register_plugin("bare", library_path=path, options={"cpu_device_count": 1})
    jax.config.update("jax_platforms", "bare")
else:
    jax.config.update("jax_platforms", "mpi_cuda")

f = jax.jit(lambda x: x + 1)
x = f(jnp.ones(3))
for _ in range(2000):
    x = f(x)
x.block_until_ready()
start = time.perf_counter()
for _ in range(200000):
    x = f(x)
x.block_until_ready()
print(f"{(time.perf_counter() - start) / 200000 * 1e6:.3f}")
