"""Records optimized modules of programs for four devices, for the tests of rewriting.

    JAX_PLATFORMS=cpu python pjrt_plugin/hlo/tests/record.py [--cuda TARGET_CONFIG]

Each becomes an HloModuleProto in recorded/, as JAX's own CPU backend leaves it, or, in
recorded/cuda/, its CUDA plugin for the GPU that XLA's file TARGET_CONFIG describes
(xla/backends/gpu/target_config/specs). That needs no GPU and no driver, but the wheels
jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-runtime,
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, and XLA_FLAGS=--xla_gpu_cuda_data_dir with the folder of the
last three.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CUDA = Path(sys.argv[2]).read_text() if sys.argv[1:2] == ["--cuda"] else None
# No path of the machine that recorded them.
jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
DEVICES = (
    jax.devices()
    if CUDA is None
    else topologies.get_topology_desc(
        "four", platform="cuda", target_config=CUDA, topology="1x4x1"
    ).devices
)
MESH = Mesh(np.array(DEVICES).reshape(2, 2), ("a", "b"))
ROWS, BOTH = NamedSharding(MESH, P("a")), NamedSharding(MESH, P("a", "b"))
X = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=BOTH)
Y = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=BOTH)


def mapped(body):
    """`body` of every device's part."""
    return jax.shard_map(
        body, mesh=MESH, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False
    )


def every_kind(x):
    """One collective of each kind."""
    x = lax.psum(x, "a") + lax.pmax(x, ("a", "b")) + lax.axis_index("b")
    x = lax.psum_scatter(
        lax.all_gather(x, "b", axis=1, tiled=True), "b", scatter_dimension=1, tiled=True
    )
    x = lax.all_to_all(x, "a", 0, 1, tiled=True)
    x = lax.all_to_all(x, "a", 1, 0, tiled=True)
    return lax.ppermute(x, "b", [(0, 1)])


def nested(x):
    """Collectives in branches in loops, and in a loop's condition."""

    def inner(x):
        return lax.cond(
            lax.psum(x.sum(), ("a", "b")) > 0,
            lambda x: lax.fori_loop(0, 3, lambda _, x: lax.ppermute(x, "a", [(0, 1), (1, 0)]), x),
            lambda x: x - lax.pmin(x, "b"),
            x,
        )

    def body(carry):
        x, i = carry
        return inner(x) * 0.5, i + 1

    return lax.while_loop(lambda c: lax.pmax(c[0].max(), ("a", "b")) > c[1], body, (x, 0.0))[0]


def exchanges(x, y):
    """All-to-alls whose pieces lie one after the other, and one whose pieces do not."""

    def exchange(x, split):
        return lax.all_to_all(x, "a", split, split, tiled=True)

    carried = lax.fori_loop(0, 3, lambda _, x: exchange(x, 0), x)
    # Between other exchanges, so that nothing of it is shared with them.
    return exchange(carried @ carried, 0) @ x + exchange(x.T @ x, 1), exchange(y, 0)


def train(params, x):
    """A step of training, partitioned automatically."""

    def loss(params):
        h = jnp.tanh(x @ params["first"])
        return jnp.mean((h @ params["second"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


PARAMS = {
    "first": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(MESH, P("a", "b"))),
    "second": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(MESH, P("b", "a"))),
}
PROGRAMS = {
    "every_kind": (jax.jit(mapped(every_kind)), (X,)),
    "nested": (jax.jit(mapped(nested)), (X,)),
    "exchanges": (
        jax.jit(
            jax.shard_map(
                exchanges, mesh=MESH, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False
            ),
            donate_argnums=1,
        ),
        (X, Y),
    ),
    "train": (jax.jit(train, donate_argnums=0), (PARAMS, X)),
    "automatic": (jax.jit(lambda x: jnp.sort(x.T @ x, axis=0), out_shardings=ROWS), (X,)),
    "local": (jax.jit(lambda x: x * 2), (X,)),
}

if __name__ == "__main__":
    folder = Path(__file__).parent / "recorded" / ("" if CUDA is None else "cuda")
    platform = "cpu" if CUDA is None else "cuda"
    for name, (function, arguments) in PROGRAMS.items():
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        # An executable for a described GPU is compiled, not loaded.
        modules = lowered.compile()._executable.xla_executable.hlo_modules()
        (folder / f"{name}.hlo.pb").write_bytes(modules[0].as_serialized_hlo_module_proto())
        print(name, (folder / f"{name}.hlo.pb").stat().st_size)
