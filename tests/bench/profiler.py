"""Microseconds that an operation takes without a profile, in one with our events, and in one
without them: the shortest of SERIES, in turn.

Usage: mpirun -n 2 python profiler.py [SERIES]

loop: allreduces of 8 bytes, 200 in one program. psum: a program for all devices with one `psum` of
8 bytes, called 4 times; its time is that of a call. Each is run 40 times in a series. The profiles
are written to a folder that is removed; to write them is not in the times.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mpi_cuda as m
from mpi_cuda import notoken as mpi

LOOP, CALLS, RUNS = 200, 4, 40


def loop() -> Callable[[], None]:
    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, LOOP, lambda _, x: mpi.allreduce(x, m.SUM) / 2, x)

    x = jnp.ones(2, jnp.float32)
    return lambda: program(x).block_until_ready()


def psum() -> Callable[[], None]:
    mesh = Mesh(jax.devices(), "x")
    shape, sharding = (2 * jax.device_count(),), NamedSharding(mesh, P("x"))
    x = jax.make_array_from_callback(shape, sharding, lambda _: jnp.ones(2, jnp.float32))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P())
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "x")

    def calls() -> None:
        for _ in range(CALLS):
            program(x).block_until_ready()

    return calls


def profile(folder: str, events: bool) -> AbstractContextManager:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if events else 0
    return jax.profiler.trace(folder, profiler_options=options)


def main() -> None:
    series = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    folder = tempfile.mkdtemp()
    ways: dict[str, Callable[[], AbstractContextManager]] = {
        "without": nullcontext,
        "events": lambda: profile(folder, events=True),
        "no events": lambda: profile(folder, events=False),
    }
    for name, make, count in (("loop", loop, LOOP), ("psum", psum, CALLS)):
        run, best = make(), dict.fromkeys(ways, math.inf)
        run()
        for _ in range(series):
            for way, context in ways.items():
                with context():
                    for _ in range(RUNS):
                        mpi.barrier()
                        start = time.perf_counter()
                        run()
                        best[way] = min(best[way], time.perf_counter() - start)
        if m.COMM_WORLD.rank == 0:
            times = ", ".join(f"{way} {t / count * 1e6:.2f}" for way, t in best.items())
            print(f"{name}: {times}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


main()
