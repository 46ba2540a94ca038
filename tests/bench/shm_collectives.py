"""Microseconds of a collective in a jitted loop, through memory that the ranks of a node share and
through MPI, by size: the shortest of all loops of ROUNDS jobs with each, in turn.

BYTES are those of the longer of operand and result: what all ranks pass or get together.

Usage: python shm_collectives.py [--mpi openmpi|mpich] [--ranks N] [--rounds R] [--loops L]
       [--times T] [--operations allreduce,allgather,...] [--dtype float32] [--op SUM] [BYTES...]

On a busy machine, short loops (--times 20) more often run undisturbed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

SIZES = [8 << (2 * step) for step in range(12) if 8 << (2 * step) <= 1 << 24] + [1 << 24]


OPERATIONS = [
    "allreduce",
    "allgather",
    "reduce_scatter",
    "bcast",
    "alltoall",
    "reduce",
    "gather",
    "scatter",
    "barrier",
]
#: With a block for each rank in the operand, and in the result.
DIVIDED, GATHERED = ["reduce_scatter", "alltoall", "scatter"], ["allgather", "gather"]


def caller(operation: str, op: str) -> Callable[[jax.Array], jax.Array]:
    """Calls the operation, of root 0, with an array that has a row for each rank or one row."""
    import mpi_cuda
    from mpi_cuda import notoken

    function = getattr(notoken, operation)
    if operation == "barrier":

        def wait(x: jax.Array) -> jax.Array:
            function()
            return x

        return wait
    arguments = []
    if operation in ["allreduce", "reduce", "reduce_scatter"]:
        arguments.append(getattr(mpi_cuda, op))
    if operation in ["bcast", "reduce", "gather", "scatter"]:
        arguments.append(0)
    return lambda x: function(x, *arguments)


def measure(sizes: list[int], arguments: argparse.Namespace) -> None:
    """Prints the shortest time of each operation and size, in microseconds."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    import mpi_cuda

    jax.config.update("jax_enable_x64", True)
    ranks, rank = mpi_cuda.COMM_WORLD.size, mpi_cuda.COMM_WORLD.rank
    for operation, size in itertools.product(arguments.operations, sizes):
        if operation == "barrier" and size != sizes[0]:
            continue
        parts = ranks if operation in DIVIDED + GATHERED else 1
        elements = max(1, size // jnp.dtype(arguments.dtype).itemsize // parts)
        divided = operation in DIVIDED and (operation != "scatter" or rank == 0)
        x = jnp.ones((ranks, elements) if divided else elements, arguments.dtype)
        call = caller(operation, arguments.op)
        times = arguments.times or (1000 if size <= 4096 else max(2, (1 << 22) // size))

        @jax.jit
        def loop(
            x: jax.Array, call: Callable[[jax.Array], jax.Array] = call, times: int = times
        ) -> jax.Array:
            def body(_: int, y: jax.Array) -> jax.Array:
                return y + call(x).ravel()[:1]

            return lax.fori_loop(0, times, body, x.ravel()[:1])

        best = float("inf")
        for _ in range(arguments.loops):
            # Those that may run ahead of the root, or the root of them, do not pile up.
            mpi_cuda.notoken.barrier()
            start = time.perf_counter()
            loop(x).block_until_ready()
            mpi_cuda.notoken.barrier()
            best = min(best, (time.perf_counter() - start) / times)
        if rank == 0:
            print(f"best {operation} {size} {best * 1e6:.3f}", flush=True)


def job(arguments: argparse.Namespace, shared: str) -> dict[tuple[str, int], float]:
    """One job, with shared memory or without: the shortest time of each operation and size."""
    command = [f"mpirun.{arguments.mpi}", "-n", str(arguments.ranks), sys.executable, __file__]
    if arguments.mpi == "openmpi":
        command.insert(1, "--oversubscribe")
    options = ["--job", "--dtype", arguments.dtype, "--op", arguments.op]
    options += ["--times", str(arguments.times), "--loops", str(arguments.loops)]
    options += ["--operations", ",".join(arguments.operations)]
    sizes = [str(size) for size in arguments.sizes]
    environment = {**os.environ, "MPI_CUDA_SHM_COLLECTIVES": shared}
    done = subprocess.run(
        [*command, *options, *sizes], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("best ")]
    return {(operation, int(size)): float(best) for operation, size, best in rows}


def main() -> None:
    """Measures, or has jobs measure and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mpi", default="openmpi")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=30)
    parser.add_argument("--operations", type=lambda text: text.split(","), default=OPERATIONS)
    parser.add_argument("--times", type=int, default=0, help="calls in a loop, else by size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--op", default="SUM")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    arguments = parser.parse_args()
    if arguments.job:
        return measure(arguments.sizes, arguments)
    best: dict[str, dict[tuple[str, int], float]] = {"0": {}, "1": {}}
    for _ in range(arguments.rounds):
        for shared, found in best.items():
            for row, time_ in job(arguments, shared).items():
                found[row] = min(time_, found.get(row, time_))
    head = f"{arguments.mpi}, {arguments.ranks} ranks"
    print(f"| {head} | bytes | MPI | shared memory | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for (operation, size), mpi in best["0"].items():
        own = best["1"][operation, size]
        print(f"| {operation} | {size} | {mpi:.2f} | {own:.2f} | {mpi / own:.2f} |")


if __name__ == "__main__":
    main()
