"""Microseconds per step of the shallow-water model, and of its exchanges alone, in two versions of
the example, in turn in one job: the shortest of SERIES loops of 10 steps.

Usage: git show COMMIT:examples/shallow_water.py >old.py
       mpirun -n 4 python shallow_water.py old.py ../../examples/shallow_water.py [SERIES]

At the end: the largest difference of the fields of both, and their size.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import notoken as mpi

NX, NY, STEPS = 360, 180, 10


def version(path: str, name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The steps of the model in that file, and the exchanges of as many."""
    spec = importlib.util.spec_from_file_location(name, path)
    model = importlib.util.module_from_spec(spec)
    sys.modules[name] = model
    spec.loader.exec_module(model)
    grid = model.decompose(NX, NY, m.COMM_WORLD.size, m.COMM_WORLD.rank)
    dt = 0.15 * min(grid.dx, grid.dy) / math.sqrt(model.GRAVITY * model.DEPTH)
    state = jax.jit(partial(model.begin, grid))(model.initial_fields(grid))

    @jax.jit
    def steps(state: Any) -> Any:
        return jax.lax.fori_loop(0, STEPS, lambda _, state: model.step(grid, dt, state), state)

    @jax.jit
    def exchanges(state: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            fields, token = model.exchange(grid, *carry)
            more, token = model.exchange(grid, [*fields, fields[0]], token)
            return list(more[:3]), token

        return jax.lax.fori_loop(0, STEPS, body, (list(state.fields), state.token))

    return partial(steps, state), partial(exchanges, state)


def main() -> None:
    old, new, *rest = sys.argv[1:]
    runs = [
        run
        for path, name in ((old, "old_model"), (new, "new_model"))
        for run in version(path, name)
    ]
    results = [jax.block_until_ready(run()) for run in runs]
    best = [math.inf] * len(runs)
    for _ in range(int(rest[0]) if rest else 30):
        for place, run in enumerate(runs):
            mpi.barrier()
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[place] = min(best[place], time.perf_counter() - start)
    fields = (results[0].fields, results[2].fields)
    apart = max(jnp.abs(a[1:-1, 1:-1] - b[1:-1, 1:-1]).max() for a, b in zip(*fields, strict=True))
    apart = float(mpi.allreduce(apart, m.MAX))
    size = float(mpi.allreduce(jnp.abs(results[2].fields[0]).max(), m.MAX))
    if m.COMM_WORLD.rank == 0:
        microseconds = [t / STEPS * 1e6 for t in best]
        for name, (step, exchange) in zip(
            ("old", "new"), (microseconds[:2], microseconds[2:]), strict=True
        ):
            print(f"{name}: a step {step:.0f}, its exchanges {exchange:.0f}")
        print(f"fields differ by at most {apart:.3g}; they are up to {size:.3g}", flush=True)


main()
