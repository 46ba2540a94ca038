"""Microseconds per exchange of the ghost cells of three arrays of N x N float32, periodic in the
second dimension, which is divided among all ranks; inside a jitted loop of 50, the shortest of 30.

Usage: mpirun -n 2 python halo.py N...

by hand: a `sendrecv` for each side, with the sides of the arrays stacked. nonblocking: the same
with `isend`, `irecv` and `wait`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import notoken as mpi

RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size
LEFT, RIGHT = (RANK - 1) % SIZE, (RANK + 1) % SIZE
TIMES = 50
Fields = list[jax.Array]


def put(fields: Fields, left: jax.Array, right: jax.Array) -> Fields:
    def both(x: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_update_slice(x, first[:, None], (0, 0))
        return jax.lax.dynamic_update_slice(x, last[:, None], (0, x.shape[1] - 1))

    return [both(*one) for one in zip(fields, left, right, strict=True)]


def by_hand(fields: Fields) -> Fields:
    east, west = (jnp.stack([f[:, column] for f in fields]) for column in (-2, 1))
    left = mpi.sendrecv(east, east, LEFT, RIGHT, sendtag=1, recvtag=1)
    right = mpi.sendrecv(west, west, RIGHT, LEFT, sendtag=2, recvtag=2)
    return put(fields, left, right)


def nonblocking(fields: Fields) -> Fields:
    east, west = (jnp.stack([f[:, column] for f in fields]) for column in (-2, 1))
    coming = mpi.irecv(east, LEFT, tag=1), mpi.irecv(west, RIGHT, tag=2)
    going = mpi.isend(east, RIGHT, tag=1), mpi.isend(west, LEFT, tag=2)
    left, right = map(mpi.wait, coming)
    for request in going:
        mpi.wait(request)
    return put(fields, left, right)


def halo_exchange(fields: Fields) -> Fields:
    return mpi.halo_exchange(fields, (1, SIZE), periodic=(False, True))


def main() -> None:
    for n in map(int, sys.argv[1:]):
        fields = [jnp.ones((n, n)) for _ in range(3)]
        programs: dict[str, Callable[[Fields], Fields]] = {}
        best: dict[str, float] = {}
        for way in (by_hand, nonblocking, halo_exchange):
            programs[way.__name__] = jax.jit(
                lambda fields, way=way: jax.lax.fori_loop(0, TIMES, lambda _, f: way(f), fields)
            )
        for _ in range(31):
            for name, program in programs.items():
                mpi.barrier()
                jax.effects_barrier()
                start = time.perf_counter()
                jax.block_until_ready(program(fields))
                seconds = time.perf_counter() - start
                best[name] = min(best.get(name, seconds), seconds)
        if RANK == 0:
            shown = ", ".join(f"{name} {1e6 * s / TIMES:.1f}" for name, s in best.items())
            print(f"{n}x{n} on {SIZE} ranks: {shown}", flush=True)


if __name__ == "__main__":
    main()
