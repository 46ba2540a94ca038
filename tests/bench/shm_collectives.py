"""Microseconds of an allreduce in a jitted loop, through memory that the ranks of a node share and
through MPI, by size: the shortest of all loops of ROUNDS jobs with each, in turn.

Usage: python shm_collectives.py [--mpi openmpi|mpich] [--ranks N] [--rounds R] [--loops L]
       [--dtype float32] [--op SUM] [BYTES...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

SIZES = [8 << (2 * step) for step in range(12) if 8 << (2 * step) <= 1 << 24] + [1 << 24]


def measure(sizes: list[int], dtype: str, op: str, loops: int) -> None:
    """Prints the shortest time of an allreduce of each size, in microseconds."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import mpi_cuda
    from mpi_cuda import notoken

    jax.config.update("jax_enable_x64", True)
    reduction = getattr(mpi_cuda, op)
    for size in sizes:
        x = jnp.ones(max(1, size // jnp.dtype(dtype).itemsize), dtype)
        times = 1000 if size <= 4096 else 100 if size <= 1 << 17 else 10 if size <= 1 << 20 else 2

        @jax.jit
        def loop(x: jax.Array, times: int = times) -> jax.Array:
            def body(_: int, y: jax.Array) -> jax.Array:
                return y + notoken.allreduce(x, reduction)[:1]

            return lax.fori_loop(0, times, body, x[:1])

        best = float("inf")
        for _ in range(loops):
            start = time.perf_counter()
            loop(x).block_until_ready()
            best = min(best, (time.perf_counter() - start) / times)
        if mpi_cuda.COMM_WORLD.rank == 0:
            print(f"best {size} {best * 1e6:.3f}", flush=True)


def job(arguments: argparse.Namespace, shared: str) -> dict[int, float]:
    """One job, with shared memory or without: the shortest time of each size."""
    command = [f"mpirun.{arguments.mpi}", "-n", str(arguments.ranks), sys.executable, __file__]
    options = ["--job", "--dtype", arguments.dtype, "--op", arguments.op]
    options += ["--loops", str(arguments.loops)]
    sizes = [str(size) for size in arguments.sizes]
    environment = {**os.environ, "MPI_CUDA_SHM_COLLECTIVES": shared}
    done = subprocess.run(
        [*command, *options, *sizes], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("best ")]
    return {int(size): float(best) for size, best in rows}


def main() -> None:
    """Measures, or has jobs measure and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mpi", default="openmpi")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--op", default="SUM")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    arguments = parser.parse_args()
    if arguments.job:
        return measure(arguments.sizes, arguments.dtype, arguments.op, arguments.loops)
    best: dict[str, dict[int, float]] = {"0": {}, "1": {}}
    for _ in range(arguments.rounds):
        for shared, found in best.items():
            for size, time_ in job(arguments, shared).items():
                found[size] = min(time_, found.get(size, time_))
    print(f"| {arguments.mpi}, {arguments.ranks} ranks: bytes | MPI | shared memory | ratio |")
    print("| --- | --- | --- | --- |")
    for size in arguments.sizes:
        mpi, own = best["0"][size], best["1"][size]
        print(f"| {size} | {mpi:.2f} | {own:.2f} | {mpi / own:.2f} |")


if __name__ == "__main__":
    main()
