"""One rank of `tests/programs/veros`: `solver`, or `acc X Y RESULTS` on X times Y ranks."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

import mpi_cuda as m
from mpi_cuda import notoken as nt

SHAPE = (5, 4, 15)
RANK, SIZE = m.COMM_WORLD.rank, m.COMM_WORLD.size


def systems_of(rank: int, dtype: Any) -> list[np.ndarray]:
    """Diagonals and right sides, which elements are in the water, and which are at its bottom."""
    random = np.random.default_rng(rank)
    below, diagonal, above, right = (random.random(SHAPE).astype(dtype) for _ in range(4))
    wet = np.ones(SHAPE, bool)
    wet[0, :, :3] = wet[1, 1] = False
    return [below, diagonal + 4, above, right, wet, np.zeros(SHAPE, bool)]


def solver() -> None:
    """Veros' compiled solver on our backend and on JAX's own, and operations behind it."""
    from veros.core.special import tdma_

    assert tdma_.HAS_CPU_EXT, "Veros was installed without its compiled solver"
    jax.config.update("jax_enable_x64", True)

    def solve(*systems: Any) -> Any:
        return tdma_.tdma(*systems, device="cpu")

    @jax.jit
    def solve_and_add(*systems: Any) -> Any:
        solution = solve(*systems)
        return solution, nt.allreduce(solution, m.SUM)

    itself = xla_client.make_cpu_client().devices()[0]
    for dtype in (np.float64, np.float32):
        wanted = [
            np.asarray(jax.jit(solve)(*jax.device_put(systems_of(one, dtype), itself)))
            for one in range(SIZE)
        ]
        assert np.abs(wanted[RANK]).max() > 0.1 and (wanted[RANK][0, :, :3] == 0).all()
        solution, total = solve_and_add(*systems_of(RANK, dtype))
        np.testing.assert_array_equal(solution, wanted[RANK])
        np.testing.assert_allclose(total, sum(wanted), rtol=100 * np.finfo(dtype).eps)
    nt.barrier()
    if RANK == 0:
        print(f"{SIZE} ranks: as JAX itself")


def acc(x: int, y: int, results: str) -> None:
    """Two days of the set-up acc; 1 rank writes what others compare theirs with."""
    from veros import runtime_settings

    runtime_settings.backend, runtime_settings.device = "jax", "cpu"
    runtime_settings.num_proc = (x, y)
    runtime_settings.diskless_mode = True
    from veros.core.special import tdma_
    from veros.distributed import gather
    from veros.setups.acc.acc import ACCSetup

    assert tdma_.HAS_CPU_EXT, "Veros was installed without its compiled solver"
    model = ACCSetup(override={"runlen": 2 * 86400.0})
    model.setup()
    model.run()
    state = model.state
    found = {}
    for name in ("temp", "salt", "u", "v", "w", "psi"):
        values = getattr(state.variables, name)
        whole = np.asarray(gather(values, state.dimensions, state.var_meta[name].dims))
        found[name] = whole[..., int(state.variables.tau)]
    if SIZE == 1:
        np.savez(results, **found)
    if RANK == 0:
        wanted = np.load(results)
        for name, values in found.items():
            largest = np.abs(wanted[name]).max()
            assert largest > 0
            np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-9 * largest)
        print(f"{SIZE} ranks: as 1 rank")


if sys.argv[1] == "solver":
    solver()
else:
    acc(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
