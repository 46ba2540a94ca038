"""Microseconds per operation through JAX, by size: one jitted call ("once"), inside a jitted loop
of 100 ("loop", a launch included; of 10 above 16 MiB), for small messages inside one of 10000
("steady"), and "best": the shortest of 100 loops, which a busy machine disturbs least.

Usage: mpirun -n 2 python loop.py ours|mpi4jax|collectives|gloo OPERATION BYTES...

collectives: JAX's own collectives in shard_map, through us; gloo: the same on JAX's CPU backend.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LIBRARY, OPERATION = sys.argv[1:3]
COLLECTIVES = LIBRARY in ("collectives", "gloo")
if LIBRARY == "gloo":
    own = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
    jax.distributed.initialize("localhost:12321", 2, own)
if LIBRARY == "ours":
    from mpi_cuda import COMM_WORLD, SUM
    from mpi_cuda import notoken as mpi

    RANK, SIZE = COMM_WORLD.rank, COMM_WORLD.size
elif LIBRARY == "mpi4jax":
    import mpi4jax as mpi
    from mpi4py.MPI import COMM_WORLD, SUM

    RANK, SIZE = COMM_WORLD.Get_rank(), COMM_WORLD.Get_size()
else:
    RANK, SIZE = jax.process_index(), jax.process_count()
MESH = Mesh(np.array(jax.devices() if COLLECTIVES else jax.local_devices()), ("i",))


def operation(x: jax.Array) -> jax.Array:
    """One operation."""
    if COLLECTIVES:
        return collective(x)
    if OPERATION == "allreduce":
        return mpi.allreduce(x, op=SUM)
    if OPERATION == "sendrecv":
        return mpi.sendrecv(x, x, source=(RANK - 1) % SIZE, dest=(RANK + 1) % SIZE)
    if OPERATION == "allgather":
        return mpi.allgather(x)
    return mpi.alltoall(x.reshape(SIZE, -1)).reshape(x.shape)


def collective(x: jax.Array) -> jax.Array:
    """The same as a collective of JAX's."""
    if OPERATION == "allreduce":
        return lax.psum(x, "i")
    if OPERATION == "sendrecv":
        return lax.ppermute(x, "i", [(i, (i + 1) % SIZE) for i in range(SIZE)])
    if OPERATION == "allgather":
        return lax.all_gather(x, "i")
    return lax.all_to_all(x.reshape(SIZE, -1), "i", 0, 0).reshape(x.shape)


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of this rank's array, jitted."""
    if not COLLECTIVES:
        return jax.jit(function)
    mapped = jax.shard_map(function, mesh=MESH, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    return jax.jit(mapped)


def array(bytes_: int) -> jax.Array:
    """Ones of that size on each rank."""
    if not COLLECTIVES:
        return jnp.ones(bytes_ // 4, jnp.float32)
    ones = np.ones(bytes_ // 4, np.float32)
    sharding = NamedSharding(MESH, P("i"))
    shape = (bytes_ // 4 * SIZE,)
    return jax.make_array_from_callback(shape, sharding, lambda _: ones)


once = jitted(operation)


def repeat(x: jax.Array, times: int) -> jax.Array:
    """`times` operations in one program."""

    # The operand is the same every time, as in C; the operations' order is kept anyway.
    def body(_, y):
        z = operation(x)
        return y + z.reshape(-1)[:1]

    if COLLECTIVES:
        # XLA would take a collective of the same operand out of the loop; this costs nothing.
        def body(i, y):
            z = operation(lax.optimization_barrier((x, y))[0])
            return y + z.reshape(-1)[:1]

    return lax.fori_loop(0, times, body, jnp.zeros(1, jnp.float32))


@functools.cache
def repeated(times: int) -> Callable[..., Any]:
    """`repeat`, jitted."""
    return jitted(functools.partial(repeat, times=times))


def measure(function: Callable[..., Any], x: jax.Array, count: int) -> float:
    """Microseconds of a call."""
    # As many before: MPI maps its own memory with the first large messages, and ranks get in step.
    for _ in range(count):
        function(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(count):
        function(x).block_until_ready()
    return (time.perf_counter() - start) / count * 1e6


for size in map(int, sys.argv[3:]):
    x = array(size)
    # gloo is slow, and shows it with fewer.
    few = 20 if LIBRARY == "gloo" else 1
    count = (
        400 // few
        if size <= 65536
        else 100 // few
        if size <= 1 << 20
        else 20
        if size <= 1 << 24
        else 3
    )
    single = measure(once, x, count)
    if RANK == 0:
        print(f"once {size} {single:.3f}", flush=True)
    # Large messages in a shorter loop, whose launch costs them nothing.
    times = 100 if size <= 1 << 24 else 10
    # The first hundred are not measured: ranks that have just compiled are not in step yet.
    loops = max(1, count if size <= 65536 else 10 // few if size <= 1 << 20 else 2)
    inside = measure(repeated(times), x, loops) / times
    if RANK == 0:
        print(f"loop {size} {inside:.3f}", flush=True)
    if size <= 65536 and LIBRARY != "gloo":
        steady = measure(repeated(10000), x, 2) / 10000
        if RANK == 0:
            print(f"steady {size} {steady:.3f}", flush=True)
    if LIBRARY == "ours":
        # Of about 10 ms each, at most.
        times = 10000 if size <= 1024 else 100 if size <= 65536 else 10 if size <= 1 << 20 else 2
        best = min(measure(repeated(times), x, 1) for _ in range(100)) / times
        if RANK == 0:
            print(f"best {size} {best:.3f}", flush=True)
